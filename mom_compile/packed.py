"""The packed form: every routed token gets a row, memory by memory, by a plan of static shape (training, prefill)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import combine, conv_qkv, dispatch, grouped_linear, l2_norm, permute
from .ops.dispatch import DispatchPlan
from .ops.memory_rule import chunk_rows
from .projections import memory_group_bounds, retention_gate, route_and_gate
from .state import LayerState

if TYPE_CHECKING:
    from .mom_attention import MoMAttention


def forward(
    layer: MoMAttention,
    x: Tensor,
    state: Mapping[str, Tensor] | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    router_indices: Tensor | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """As :meth:`MoMAttention.forward` up to the output projection: o ``[B, T, HV, V]``, state, logits."""
    config, rule = layer.config, layer.rule
    batch, length, _ = x.shape
    memories = config.total_memories
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device) * length
    sequences = cu_seqlens.shape[0] - 1
    routing, gates = route_and_gate(layer, x, router_indices)
    plan = dispatch(
        routing.indices.flatten(0, 1),
        cu_seqlens,
        config.num_memories,
        None if valid is None else valid.flatten(),
        config.shared_mem,
    )
    tokens = x.flatten(0, 1)
    q = layer.q_proj(tokens)
    kv = grouped_linear(permute(tokens, plan), layer.kv_proj, memory_group_bounds(layer, plan.group_offset))
    new_state: LayerState = {}
    if config.use_short_conv:
        history = None if state is None else state["conv_state"].flatten(0, 1).to(kv.dtype)
        q, k, v, conv_state = conv_qkv(q, kv, layer.conv1d, plan, config.head_dim, history)
        new_state["conv_state"] = torch.unflatten(conv_state, 0, (sequences, memories))
    else:
        k, v = F.silu(kv).split([layer.key_size, layer.value_size], 1)
        heads = (config.num_heads, config.head_dim)
        q, k = (l2_norm(torch.unflatten(part, 1, heads)) for part in (permute(F.silu(q), plan), k))
    v = torch.unflatten(v, 1, (config.value_heads, config.value_dim))

    g, beta, dt = _rows_of_gates(layer, [gates.g, gates.beta, gates.dt], plan)
    if rule.gate == "head":
        g = retention_gate(config.value_heads, x.device)
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)
    recurrent = None if state is None else state["recurrent_state"].flatten(0, 1)
    o, final_state = chunk_rows(rule.name, q, k, v, g, beta, layer.scale, recurrent, plan)
    new_state["recurrent_state"] = torch.unflatten(final_state, 0, (sequences, memories))
    o = combine(o, routing.weights.flatten(0, 1), plan)
    return torch.unflatten(o, 0, (batch, length)), new_state, routing.logits


def _rows_of_gates(layer: MoMAttention, gates: list[Tensor | None], plan: DispatchPlan) -> list[Tensor | None]:
    """``[B, T, G, HV]`` -> ``[S, HV]``: each row takes its token's value for its own memory; pad rows are zero."""
    present = [gate.flatten(0, 1) for gate in gates if gate is not None]
    if not present:
        return list(gates)
    groups = present[0].shape[1]
    rows = torch.unflatten(permute(torch.cat(present, 2).flatten(1), plan), 1, (groups, -1))  # [S, G, n * HV]
    if groups > 1:
        # A product with a one-hot row picks the memory: its gradient needs no scatter.
        memory = plan.chunk_segment % groups
        one_hot = (memory.unsqueeze(1) == torch.arange(groups, device=memory.device)).to(rows.dtype)
        rows = (torch.unflatten(rows, 0, (memory.shape[0], -1)) * one_hot[:, None, :, None]).sum(2).flatten(0, 1)
    else:
        rows = rows.squeeze(1)
    parts = list(rows.split(layer.config.value_heads, 1))
    return [None if gate is None else parts.pop(0) for gate in gates]
