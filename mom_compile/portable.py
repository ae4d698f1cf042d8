"""The portable form: each memory's tokens compacted to the front of ``[B, M', T]`` (export, tiny sizes).

Apart from ``mom::route``, ``mom::recurrent_<rule>`` and ``mom::gated_rms_norm``, which exporters decompose, plain aten
operators with static shapes; no sort, no scatter with reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import l2_norm
from .ops.memory_rule import recurrent
from .projections import convolution_blocks, retention_gate, route_and_gate
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
    memories, heads, value_heads = config.total_memories, config.num_heads, config.value_heads
    routing, gates = route_and_gate(layer, x, router_indices)
    memory_ids = torch.arange(config.num_memories, device=x.device)
    selected = (routing.indices.unsqueeze(-1) == memory_ids).any(2)  # [B, T, M]
    indices = routing.indices
    weights = routing.weights
    if config.shared_mem:
        selected = torch.cat([selected, torch.ones_like(selected[:, :, :1])], 2)
        indices = torch.cat([indices, torch.full_like(indices[:, :, :1], config.num_memories)], 2)
        weights = torch.cat([weights, torch.ones_like(weights[:, :, :1])], 2)
    if valid is not None:
        selected = selected & valid.unsqueeze(-1)

    # rank: position of a token among those of its memory; source: the token at each position, slot T is trash.
    selected = selected.transpose(1, 2)  # [B, M', T]
    count = selected.to(torch.int64).cumsum(2)
    rank = count - 1
    position = torch.arange(length, device=x.device)
    slot = torch.where(selected, rank, length)
    source = torch.zeros(batch, memories, length + 1, dtype=torch.int64, device=x.device)
    source = source.scatter(2, slot, position.expand(batch, memories, length))[:, :, :length]
    total = count[:, :, -1:]  # [B, M', 1]
    filled = position < total  # [B, M', T]

    # Tensors of the slots are [B, T, M', n], as the rule takes them: rows are copied into place, nothing is transposed.
    source, filled = source.transpose(1, 2), filled.transpose(1, 2)  # [B, T, M']
    first = torch.arange(batch, device=x.device).view(batch, 1, 1) * length
    token = first + source
    # Slots without a token hold the first token's: no rank reads them, and the gates keep them out of the memories.
    qkv = _memory_rows(layer, x, token)  # [B, T, M', C]
    new_state: LayerState = {}
    if config.use_short_conv:
        qkv, new_state["conv_state"] = _convolve(layer, qkv, state, total)
    qk, v = F.silu(qkv).split([2 * layer.key_size, layer.value_size], 3)
    q, k = l2_norm(torch.unflatten(qk, 3, (2 * heads, config.head_dim))).split([heads, heads], 3)
    v = torch.unflatten(v, 3, (value_heads, config.value_dim))

    mask = filled.unsqueeze(-1).to(routing.weights.dtype)
    g, beta, dt = (None if gate is None else _group_rows(gate, token) * mask for gate in gates)
    name = rule.name
    if rule.gate == "head":
        # Empty slots must not decay, so the constant becomes a value per token.
        g = retention_gate(value_heads, x.device) * mask
        name = "mamba2"
    if dt is not None:
        v = v * dt.unsqueeze(-1).to(v.dtype)
    elif beta is None:
        v = v * mask.unsqueeze(-1).to(v.dtype)
    recurrent_state = None if state is None else state["recurrent_state"].flatten(1, 2)
    o, final_state = recurrent(
        name,
        q.flatten(2, 3),
        k.flatten(2, 3),
        v.flatten(2, 3),
        None if g is None else g.flatten(2),
        None if beta is None else beta.flatten(2),
        layer.scale,
        recurrent_state,
    )
    new_state["recurrent_state"] = torch.unflatten(final_state, 1, (memories, value_heads))

    # Back to the tokens: choice j of token t reads slot rank[t] of its memory.
    slot = rank.transpose(1, 2).gather(2, indices)  # [B, T, k']
    row = (first + torch.maximum(slot, torch.zeros_like(slot))) * memories + indices
    rows = _rows(torch.unflatten(o, 2, (memories, value_heads)).flatten(3).flatten(1, 2), row)  # [B, T, k', HV * V]
    if valid is not None:
        weights = weights * valid.unsqueeze(-1).to(weights.dtype)
    o = (rows * weights.unsqueeze(-1).to(rows.dtype)).sum(2)
    return torch.unflatten(o, 2, (value_heads, config.value_dim)), new_state, routing.logits


def _memory_rows(layer: MoMAttention, x: Tensor, token: Tensor) -> Tensor:
    """q, k and v of the tokens ``[B, T, M']`` for each memory, ``[B, T, M', C]``, by one gather."""
    groups, memories = layer.kv_proj.shape[0], token.shape[2]
    place = convolution_blocks(layer.key_size, layer.value_size, groups, memories, x.device)  # [M', blocks]
    projected = torch.cat([layer.q_proj(x), F.linear(x, layer.kv_proj.flatten(0, 1))], 2)
    unit = (2 * layer.key_size + layer.value_size) // place.shape[1]
    blocks = projected.unflatten(2, (-1, unit))  # [B, T, P, unit]
    index = token.unsqueeze(3) * blocks.shape[2] + place
    return _rows(blocks.flatten(1, 2), index).flatten(3)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``[B, P, n]`` and indices ``[B, T, ...]`` into its first two axes together -> ``[B, T, ..., n]``."""
    return torch.unflatten(x.flatten(0, 1).index_select(0, index.flatten()), 0, index.shape)


def _group_rows(x: Tensor, token: Tensor) -> Tensor:
    """``[B, T, G, n]`` of the tokens ``[B, T, M']`` -> ``[B, T, M', n]``; G = 1 serves every memory."""
    groups = x.shape[2]
    index = token if groups == 1 else token * groups + torch.arange(groups, device=x.device)
    return _rows(x.flatten(1, 2), index)


def _convolve(
    layer: MoMAttention, x: Tensor, state: Mapping[str, Tensor] | None, total: Tensor
) -> tuple[Tensor, Tensor]:
    """The convolution before its activation: x ``[B, T, M', C]`` and the new state ``[B, M', C, W-1]``."""
    batch, _, memories, channels = x.shape
    width = layer.config.conv_size
    if state is None:
        history = x.new_zeros(batch, memories * channels, width - 1)
    else:
        history = state["conv_state"].to(x.dtype).flatten(1, 2)
    padded = torch.cat([history, x.flatten(2).transpose(1, 2)], 2)  # [B, M' * C, W-1 + T]
    # One depthwise convolution over the channels of all memories: the batch axis stays alone, as exporters want it.
    weight = layer.conv1d.to(x.dtype).unsqueeze(1).repeat(memories, 1, 1)
    y = F.conv1d(padded, weight, groups=memories * channels).transpose(1, 2)
    last = total + torch.arange(width - 1, device=x.device)  # [B, M', W-1]
    last = last.unsqueeze(2).expand(batch, memories, channels, width - 1)
    new_state = torch.unflatten(padded, 1, (memories, channels)).gather(3, last)
    return torch.unflatten(y, 2, (memories, channels)), new_state
