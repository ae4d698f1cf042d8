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

    ``touched_index`` ``[B, k']`` int64, the selected memories; ``touched_state`` ``[B, k' * HV, K, V]`` and, with a
    convolution, ``touched_conv_state`` ``[B, k' * C, W-1]``: memories and heads (channels) in one axis, as the graphs
    carry them.
    """
    assert state is not None and valid is None
    config, rule = layer.config, layer.rule
    batch, heads, value_heads = x.shape[0], config.num_heads, config.value_heads
    routing, gates = route_and_gate(layer, x, router_indices)
    memory, weights = routing.indices.squeeze(1), routing.weights  # [B, k], [B, 1, k]
    if config.shared_mem:
        memory = F.pad(memory, (0, 1), value=config.num_memories)
        weights = F.pad(weights, (0, 1), value=1.0)
    choices = memory.shape[1]
    first = torch.arange(batch, device=x.device).unsqueeze(1)
    pool = first * config.total_memories + memory  # [B, k'] in the flattened states
    group = first.expand_as(memory) if config.single_kv_proj else pool

    # On [B, 1, D], as the other forms: exporters then keep one layout of a weight.
    kv = torch.unflatten(F.linear(x, layer.kv_proj.flatten(0, 1)).squeeze(1), 1, (layer.kv_proj.shape[0], -1))
    q = layer.q_proj(x).expand(batch, choices, layer.key_size)
    qkv = torch.cat([q, _rows(kv.flatten(0, 1), group)], 2)  # [B, k', C]
    new_state: LayerState = {"touched_index": memory}
    if config.use_short_conv:
        window = _rows(state["conv_state"].flatten(0, 1), pool).to(qkv.dtype)
        window = torch.cat([window, qkv.unsqueeze(-1)], 3)
        qkv = (window * layer.conv1d.to(qkv.dtype)).sum(3)
        new_state["touched_conv_state"] = window[..., 1:].to(state["conv_state"].dtype).flatten(1, 2)
    qk, v = F.silu(qkv).split([2 * layer.key_size, layer.value_size], 2)
    q, k = l2_norm(torch.unflatten(qk, 2, (2 * heads, config.head_dim))).split([heads, heads], 2)
    v = torch.unflatten(v, 2, (value_heads, config.value_dim))
    g, beta, dt = (None if gate is None else _rows(gate.flatten(0, 2), group) for gate in gates)
    name = rule.name
    if rule.gate == "head":  # exporters know a decay per token alone
        g, name = retention_gate(value_heads, x.device).expand(batch, choices, value_heads), "mamba2"
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)

    def merge(part: Tensor) -> Tensor:
        return part.reshape(batch, 1, -1, *part.shape[3:])

    o, final_state = recurrent(
        name,
        merge(q),
        merge(k),
        merge(v),
        None if g is None else merge(g),
        None if beta is None else merge(beta),
        layer.scale,
        _rows(state["recurrent_state"].flatten(0, 1), pool).flatten(1, 2),
    )
    new_state["touched_state"] = final_state
    o = weights.to(o.dtype) @ o.view(batch, choices, value_heads * config.value_dim)
    return torch.unflatten(o, 2, (value_heads, config.value_dim)), new_state, routing.logits


def dense(
    layer: MoMAttention,
    x: Tensor,
    state: Mapping[str, Tensor] | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    router_indices: Tensor | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """One token, for export: as :func:`forward`, every memory computed and those not selected kept by a mask.

    Neither gather nor scatter, so that an engine can fuse the whole update. A memory that the token did not select
    stays bit-identical: it is multiplied by exp(0) and zero is added.
    """
    assert state is not None and valid is None
    config, rule = layer.config, layer.rule
    batch, memories = x.shape[0], config.total_memories
    heads, value_heads = config.num_heads, config.value_heads
    routing, gates = route_and_gate(layer, x, router_indices)
    # From the choice, not from weight > 0: a weight may underflow.
    one_hot = (routing.indices.squeeze(1).unsqueeze(-1) == torch.arange(config.num_memories, device=x.device)).to(
        routing.weights.dtype
    )  # [B, k, M]
    selected, weights = one_hot.sum(1), (routing.weights.squeeze(1).unsqueeze(-1) * one_hot).sum(1)
    if config.shared_mem:
        shared = torch.ones_like(selected[:, :1])
        selected, weights = torch.cat([selected, shared], 1), torch.cat([weights, shared], 1)

    kv = torch.unflatten(F.linear(x, layer.kv_proj.flatten(0, 1)).squeeze(1), 1, (layer.kv_proj.shape[0], -1))
    q = layer.q_proj(x).expand(batch, memories, layer.key_size)
    qkv = torch.cat([q, kv.expand(batch, memories, kv.shape[2])], 2)  # [B, M', C]
    new_state: LayerState = {}
    if config.use_short_conv:
        conv_state = state["conv_state"]
        window = torch.cat([conv_state.to(qkv.dtype), qkv.unsqueeze(-1)], 3)
        qkv = (window * layer.conv1d.to(qkv.dtype)).sum(3)
        new_window = window[..., 1:].to(conv_state.dtype)
        new_state["conv_state"] = torch.where(selected[..., None, None] > 0, new_window, conv_state)
    qkv = F.silu(qkv)
    q, k, v = qkv.split([layer.key_size, layer.key_size, layer.value_size], 2)
    q, k = (l2_norm(torch.unflatten(part, 2, (heads, config.head_dim))) for part in (q, k))
    v = torch.unflatten(v, 2, (value_heads, config.value_dim))

    mask = selected.unsqueeze(-1)  # [B, M', 1]
    g, beta, dt = (None if gate is None else gate.squeeze(1) * mask for gate in gates)
    name = rule.name
    if rule.gate == "head":  # a constant would decay the memories that were not selected
        g, name = retention_gate(value_heads, x.device) * mask, "mamba2"
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)
    elif beta is None:
        v = v * mask.unsqueeze(-1).to(v.dtype)

    def merge(part: Tensor) -> Tensor:
        return part.flatten(1, 2).unsqueeze(1)

    o, final_state = recurrent(
        name,
        merge(q),
        merge(k),
        merge(v),
        None if g is None else merge(g),
        None if beta is None else merge(beta),
        layer.scale,
        state["recurrent_state"].flatten(1, 2),
    )
    new_state["recurrent_state"] = torch.unflatten(final_state, 1, (memories, value_heads))
    o = torch.unflatten(o.squeeze(1), 1, (memories, value_heads))
    o = (o * weights[..., None, None].to(o.dtype)).sum(1)
    return o.unsqueeze(1), new_state, routing.logits


def _token(
    layer: MoMAttention,
    x: Tensor,
    state: LayerState,
    valid: Tensor | None,
    router_indices: Tensor | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """One token, differentiable: x ``[B, 1, D]``, valid ``[B]``, o ``[B, HV, V]``."""
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

    kv = torch.unflatten(F.linear(x, layer.kv_proj.flatten(0, 1))[:, 0], 1, (layer.kv_proj.shape[0], -1))
    q = layer.q_proj(x).expand(batch, choices, layer.key_size)
    qkv = torch.cat([q, _pick(kv, group)], 2)  # [B, k', C]
    new_state: LayerState = {}
    if config.use_short_conv:
        conv_state = state["conv_state"].flatten(0, 1)
        window = torch.cat([conv_state[pool].to(qkv.dtype), qkv.unsqueeze(-1)], 3)
        qkv = (window * layer.conv1d.to(qkv.dtype)).sum(3)
        new_window = window[..., 1:].to(conv_state.dtype)
        if valid is not None:
            new_window = torch.where(valid.view(-1, 1, 1, 1), new_window, conv_state[pool])
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
