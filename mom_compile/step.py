"""The step form: one token (or a few, one after the other), only the selected memories read and written (decode)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import decode_step, l2_norm
from .ops.memory_rule import recurrent
from .projections import custom_routing, retention_gate, route_and_gate, small_products
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
    current: LayerState = dict(state) if state is not None else layer.init_state(x.shape[0], x.device)
    if not torch.is_grad_enabled():
        return _fused(layer, x, current, valid, router_indices)
    outputs, logits = [], []
    for t in range(x.shape[1]):
        o, current, token_logits = _token(
            layer,
            x[:, t : t + 1],
            current,
            None if valid is None else valid[:, t],
            None if router_indices is None else router_indices[:, t : t + 1],
        )
        outputs.append(o)
        logits.append(token_logits)
    all_logits = None if logits[0] is None else torch.cat([item for item in logits if item is not None], 1)
    return torch.stack(outputs, 1), current, all_logits


def _fused(
    layer: MoMAttention, x: Tensor, state: LayerState, valid: Tensor | None, router_indices: Tensor | None
) -> tuple[Tensor, LayerState, Tensor | None]:
    """All tokens in the one operator of decoding, which has no gradient."""
    config, rule = layer.config, layer.rule
    logits, b, a = small_products(layer, x)
    weights = None
    if logits is None:
        weights, router_indices = custom_routing(layer, x)
    o, recurrent_state, conv_state = decode_step(
        layer.q_proj(x),
        torch.unflatten(F.linear(x, layer.kv_proj.flatten(0, 1)), 2, (layer.kv_proj.shape[0], -1)),
        state["recurrent_state"],
        state.get("conv_state"),
        router_logits=logits,
        router_indices=router_indices,
        router_weights=weights,
        a=a,
        b=b,
        A_log=layer.A_log if a is not None else None,
        dt_bias=layer.dt_bias if a is not None else None,
        conv_weight=layer.conv1d if config.use_short_conv else None,
        valid=valid,
        rule=rule.name,
        topk=config.topk,
        shared=config.shared_mem,
        scale=layer.scale,
    )
    new_state: LayerState = {}
    if conv_state is not None:
        new_state["conv_state"] = conv_state
    return o, {**new_state, "recurrent_state": recurrent_state}, logits


def touched(
    layer: MoMAttention,
    x: Tensor,
    state: Mapping[str, Tensor] | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    router_indices: Tensor | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """One token, for export: as :func:`forward`, the new state being only what the token wrote.

    ``touched_index`` ``[B, k']`` int64, the selected memories; ``touched_state`` ``[B, k', HV, K, V]`` and, with a
    convolution, ``touched_conv_state`` ``[B, k', C, W-1]``.
    """
    assert state is not None and valid is None
    o, new_state, logits = _token(layer, x, dict(state), None, router_indices, touched=True)
    return o.unsqueeze(1), new_state, logits


def _token(
    layer: MoMAttention,
    x: Tensor,
    state: LayerState,
    valid: Tensor | None,
    router_indices: Tensor | None,
    touched: bool = False,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """One token, differentiable: x ``[B, 1, D]``, valid ``[B]``, o ``[B, HV, V]``; ``touched`` as :func:`touched`."""
    config, rule = layer.config, layer.rule
    batch = x.shape[0]
    memories = config.total_memories
    routing, gates = route_and_gate(layer, x, router_indices)
    memory, weights = routing.indices[:, 0], routing.weights[:, 0]  # [B, k]
    if config.shared_mem:
        memory = torch.cat([memory, torch.full_like(memory[:, :1], config.num_memories)], 1)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
    choices = memory.shape[1]
    pool = torch.arange(batch, device=x.device).unsqueeze(1) * memories + memory  # [B, k'] in the flattened states
    group = torch.zeros_like(memory) if config.single_kv_proj else memory

    # On [B, 1, D], as the other forms: exporters then keep one layout of a weight.
    kv = torch.unflatten(F.linear(x, layer.kv_proj.flatten(0, 1))[:, 0], 1, (layer.kv_proj.shape[0], -1))
    q = layer.q_proj(x).expand(batch, choices, layer.key_size)
    qkv = torch.cat([q, _pick(kv, group)], 2)  # [B, k', C]
    new_state: LayerState = {"touched_index": memory} if touched else {}
    if config.use_short_conv:
        conv_state = state["conv_state"].flatten(0, 1)
        window = torch.cat([_rows(conv_state, pool).to(qkv.dtype), qkv.unsqueeze(-1)], 3)
        qkv = (window * layer.conv1d.to(qkv.dtype)).sum(3)
        new_window = window[..., 1:].to(conv_state.dtype)
        if touched:
            new_state["touched_conv_state"] = new_window
        if valid is not None:
            new_window = torch.where(valid.view(-1, 1, 1, 1), new_window, conv_state[pool])
        if not touched:
            conv_state = conv_state.index_put((pool,), new_window)
            new_state["conv_state"] = torch.unflatten(conv_state, 0, (batch, memories))
    qkv = F.silu(qkv)
    q, k, v = qkv.flatten(0, 1).split([layer.key_size, layer.key_size, layer.value_size], 1)
    q, k = (l2_norm(torch.unflatten(part, 1, (config.num_heads, config.head_dim))).unsqueeze(1) for part in (q, k))
    v = torch.unflatten(v, 1, (config.value_heads, config.value_dim)).unsqueeze(1)
    g, beta, dt = (None if gate is None else _pick(gate[:, 0], group).flatten(0, 1).unsqueeze(1) for gate in gates)
    if rule.gate == "head":
        g = retention_gate(config.value_heads, x.device)
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)
    recurrent_state = state["recurrent_state"].flatten(0, 1)
    if touched:
        name = rule.name
        if rule.gate == "head" and g is not None:  # exporters know a decay per token alone
            g, name = g.expand(batch * choices, 1, config.value_heads), "mamba2"
        picked = _rows(recurrent_state, pool).flatten(0, 1)
        o, final_state = recurrent(name, q, k, v, g, beta, layer.scale, picked)
        new_state["touched_state"] = torch.unflatten(final_state, 0, (batch, choices))
    else:
        rows = pool if valid is None else torch.where(valid.unsqueeze(1), pool, -1)
        o, final_state = recurrent(rule.name, q, k, v, g, beta, layer.scale, recurrent_state, rows.flatten())
        new_state["recurrent_state"] = torch.unflatten(final_state, 0, (batch, memories))
    o = o.view(batch, choices, config.value_heads, config.value_dim)
    return (o * weights[..., None, None].to(o.dtype)).sum(1), new_state, routing.logits


def _pick(x: Tensor, group: Tensor) -> Tensor:
    """``[B, G, n]`` -> ``[B, k', n]``."""
    return x.gather(1, group.unsqueeze(-1).expand(*group.shape, x.shape[2]))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``[P, ...]`` and ``[B, k']`` -> ``[B, k', ...]``."""
    return torch.unflatten(x.index_select(0, index.flatten()), 0, index.shape)
