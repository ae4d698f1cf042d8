"""The packed form: every routed token gets a row, memory by memory, by a plan of static shape (training, prefill)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import combine, combine_norm, conv_qkv, dispatch, gate_rows, grouped_linear, l2_norm, permute
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
    """As :meth:`MoMAttention.forward` up to the output projection: o ``[B, T, HV, V]`` behind norm and gate, state,
    logits."""
    config, rule = layer.config, layer.rule
    batch, length, _ = x.shape
    memories = config.total_memories
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device) * length
    sequences = cu_seqlens.shape[0] - 1
    routing, gates = route_and_gate(layer, x, router_indices, packed=True)
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

    g, beta, dt = _rows_of_gates([gates.g, gates.beta, gates.dt], plan)
    if rule.gate == "head":
        g = retention_gate(config.value_heads, x.device)
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)
    recurrent = None if state is None else state["recurrent_state"].flatten(0, 1)
    o, final_state = chunk_rows(rule.name, q, k, v, g, beta, layer.scale, recurrent, plan.segments)
    new_state["recurrent_state"] = torch.unflatten(final_state, 0, (sequences, memories))
    weights, heads = routing.weights.flatten(0, 1), (config.value_heads, config.value_dim)
    if config.use_output_gate:
        gate = torch.unflatten(layer.g_proj(tokens), 1, heads)
        o = combine_norm(o.to(gate.dtype), weights, plan, gate, layer.o_norm.weight, config.norm_eps)
        o = torch.unflatten(o, 0, (batch, length))
    else:
        o = layer.output_norm(x, torch.unflatten(combine(o, weights, plan), 0, (batch, length)))
    return o, new_state, routing.logits


def _rows_of_gates(gates: list[Tensor | None], plan: DispatchPlan) -> list[Tensor | None]:
    """``[B, T, G, HV]`` -> ``[S, HV]``: each row takes its token's value for its own memory; pad rows are zero."""
    present = [gate.flatten(0, 1) for gate in gates if gate is not None]
    if not present:
        return list(gates)
    rows = list(gate_rows(torch.stack(present, 2), plan).unbind())
    return [None if gate is None else rows.pop(0) for gate in gates]
