"""``mom::decode_step`` for one token in as few nodes of ONNX Runtime as it takes: on a GPU each is a kernel to launch.

Two ways through the memories: *masked*, all of them are computed, and those that the token did not select are kept by a
decay and a beta of zero; *touched*, the selected ones are gathered, and only they come out. *transposed* is masked with
the rule's norm and gates in one node, which is the fast one on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import RULES
from ..ops.decode_step.op import Arguments
from ..projections import convolution_blocks, retention_gate
from .microsoft_nodes import causal_conv, decay_and_beta, gated_delta_net, linear_attention, rms_norm

TRANSPOSED_RULES = ("gated_delta", "delta")
"""Those of :func:`transposed_step`."""
NEVER = -1e4  # before softplus or a sigmoid: exactly 0 behind it


class _Gates(NamedTuple):
    """``[B, m, HV]``, m = 1 where one serves all memories; None where the rule has none."""

    g: Tensor | None
    beta: Tensor | None
    dt: Tensor | None  # multiplies v


def masked_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As ``mom::decode_step`` for T = 1, without gather and scatter of states: CUDA's scatter is slow on such rows."""
    args = _one_token(arguments)
    weights, selected = _selection(args)
    g, beta, dt = (None if gate is None else torch.where(selected, gate, 0.0) for gate in _gates(args))
    if beta is None and dt is None:  # nothing else keeps a memory from being written
        dt = selected.float()
    qkv, window = _convolve_selected(args, selected)
    o, state = _remember(args, qkv, _Gates(g, beta, dt), args.recurrent_state)
    return _read(args, o, weights), state, o if window is None else window


def transposed_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`masked_step` for ``TRANSPOSED_RULES`` and K = V; the states come and go transposed, V before K."""
    args = _one_token(arguments)
    state = args.recurrent_state
    memories, _, key_dim, value_dim = state.shape[1:]
    assert args.rule in TRANSPOSED_RULES and key_dim == value_dim and args.b is not None
    weights, selected = _selection(args)

    def gate(x: Tensor) -> Tensor:
        """``[B, 1, m, HV]`` -> ``[B, M' * HV]``."""
        return torch.where(selected, x.squeeze(1), NEVER).flatten(1)

    def heads(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat(memories)

    qkv, window = _convolve_selected(args, selected)
    q, k, v = (part.unflatten(2, (-1, key_dim)).flatten(1, 2) for part in _split(args, qkv))
    # The states in the shape that the graph gives and takes them: another would be a copy.
    o, final_state = gated_delta_net(
        RULES[args.rule],
        *(q, k, v),
        None if args.a is None else gate(args.a),
        gate(args.b),
        state.flatten(1, 2).float(),
        *(heads(args.A_log), heads(args.dt_bias)),
        args.scale,
    )
    o = o.view(-1, memories, o.shape[1] // memories * value_dim)
    return _read(args, o, weights), final_state.to(state.dtype).view(state.shape), o if window is None else window


def touched_step(indices: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`masked_step`, the new states those of the k' selected memories; ``indices`` receives which."""
    args = _one_token(arguments)
    batch, memories = args.recurrent_state.shape[:2]
    weights, chosen = _route(args)
    if args.shared:  # not as padding: ONNX Runtime pads integers on the CPU alone
        # Nor by a concatenation: of unequal parts, CUDA copies their sizes and addresses to the device first.
        rank = torch.arange(args.topk, device=chosen.device).expand(batch, args.topk)
        last = torch.full((1, args.topk + 1), memories - 1, device=chosen.device).expand(batch, args.topk + 1)
        chosen, weights = last.scatter(1, rank, chosen), F.pad(weights, (0, 1), value=1.0)
    indices.append(chosen)
    first = torch.arange(batch, device=chosen.device).unsqueeze(1)
    pool = first * memories + chosen  # [B, k']

    def pick(x: Tensor) -> Tensor:
        """``[B, M', ...]`` -> ``[B, k', ...]``; with one entry for all memories, that one."""
        if x.shape[1] == 1:
            return x
        return x.flatten(0, 1).index_select(0, pool.flatten()).unflatten(0, pool.shape)

    gates = _Gates(*(None if gate is None else pick(gate) for gate in _gates(args)))
    blocks, place = _blocks(args)
    index = first.unsqueeze(2) * blocks.shape[1] + place.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
    qkv = blocks.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).flatten(2)
    qkv, window = _convolve(args, qkv, None if args.conv_state is None else pick(args.conv_state))
    o, state = _remember(args, qkv, gates, pick(args.recurrent_state))
    return _read(args, o, weights), state, o if window is None else window


def _one_token(arguments: tuple[Any, ...]) -> Arguments:
    args = Arguments(*arguments)
    assert args.q.shape[1] == 1 and args.valid is None and args.norm_weight is None
    return args


def _route(args: Arguments) -> tuple[Tensor, Tensor]:
    """Weights and choices ``[B, k]``."""
    if args.router_logits is None:
        assert args.router_weights is not None and args.router_indices is not None
        return args.router_weights.squeeze(1), args.router_indices.squeeze(1)
    logits = args.router_logits.squeeze(1)
    if args.router_indices is None:
        values, chosen = torch.topk(logits, args.topk, -1)  # ONNX TopK takes the lowest index among equals
    else:
        chosen = args.router_indices.squeeze(1)
        values = logits.gather(1, chosen)
    return torch.softmax(values, -1), chosen


def _selection(args: Arguments) -> tuple[Tensor, Tensor]:
    """The memories' weights ``[B, M']`` and whether they are selected ``[B, M', 1]``."""
    batch, memories = args.recurrent_state.shape[:2]
    weights, chosen = _route(args)
    # Below zero, and nothing in a sum, where not selected: a weight of zero may be a selected one that underflowed.
    rest = torch.tensor([[-1e-30] * (memories - args.shared) + [1.0] * args.shared])
    weights = rest.expand(batch, memories).scatter(1, chosen, weights)
    return weights, weights.unsqueeze(2) >= 0


def _gates(args: Arguments) -> _Gates:
    a, b, (batch, _, value_heads) = args.a, args.b, args.recurrent_state.shape[:3]
    if RULES[args.rule].gate == "head":
        return _Gates(retention_gate(value_heads, args.q.device).expand(batch, 1, value_heads), None, None)
    if a is None:
        return _Gates(None, None if b is None else b.squeeze(1).sigmoid(), None)
    assert args.A_log is not None and args.dt_bias is not None
    if b is None:
        dt = F.softplus(a.squeeze(1) + args.dt_bias)
        return _Gates(-args.A_log.exp() * dt, None, dt)
    decay, beta = decay_and_beta(
        a.flatten(2), args.dt_bias.repeat(a.shape[2]), args.A_log.repeat(a.shape[2]), b.flatten(2)
    )
    return _Gates(decay.view(batch, -1, value_heads), beta.view(batch, -1, value_heads), None)


def _blocks(args: Arguments) -> tuple[Tensor, Tensor]:
    """q, k and v of all groups in blocks ``[B, P, unit]``, and those of each memory ``[M', blocks]``: one gather."""
    groups, width = args.kv.shape[2:]
    keys, memories = args.q.shape[2], args.recurrent_state.shape[1]
    place = convolution_blocks(keys, width - keys, groups, memories, args.q.device)
    # Two products of one x side by side: as one, see join_products.
    projected = torch.cat([args.q, args.kv.flatten(2)], 2).squeeze(1)
    return projected.unflatten(1, (-1, (keys + width) // place.shape[1])), place


def _convolve_selected(args: Arguments, selected: Tensor) -> tuple[Tensor, Tensor | None]:
    """q, k and v of every memory ``[B, M', C]``, and the windows, of which only the selected ones moved on."""
    blocks, place = _blocks(args)
    qkv = blocks.index_select(1, place.flatten()).unflatten(1, place.shape).flatten(2)
    qkv, window = _convolve(args, qkv, args.conv_state)
    if window is not None and args.conv_state is not None:
        window = torch.where(selected.unsqueeze(3), window, args.conv_state)
    return qkv, window


def _convolve(args: Arguments, qkv: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``[B, m, C]`` behind convolution and SiLU, and the new window of ``past`` ``[B, m, C, W-1]``."""
    if past is None:
        return F.silu(qkv), None
    assert args.conv_weight is not None
    # Memories are batches to the node: all in one axis of channels, they would need a copy of the weight each.
    weight, rows = args.conv_weight.to(qkv.dtype).unsqueeze(1), qkv.flatten(0, 1).unsqueeze(2)
    y, window = causal_conv(rows, weight, past.to(qkv.dtype).flatten(0, 1), "silu")
    return y.view(qkv.shape), window.view(past.shape).to(past.dtype)


def _split(args: Arguments, qkv: Tensor) -> Sequence[Tensor]:
    """q, k and v of ``[B, m, C]``. In three: CUDA splits unequal parts in one launch only so."""
    keys = args.q.shape[2]
    return qkv.split([keys, keys, qkv.shape[2] - 2 * keys], 2)


def _remember(args: Arguments, qkv: Tensor, gates: _Gates, state: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of q and k and the rule: o ``[B, m, HV * V]`` and the new state."""
    rule, (memories, value_heads, key_dim, value_dim) = RULES[args.rule], state.shape[1:]
    q, k, v = _split(args, qkv)
    # x rsqrt(sum x^2 + 1e-6), as an RMSNorm.
    unit = torch.full((key_dim,), key_dim**-0.5)
    q, k = (rms_norm(x.unflatten(2, (-1, key_dim)), (key_dim,), unit, 1e-6 / key_dim) for x in (q, k))
    v = v.unflatten(2, (value_heads, value_dim))
    if gates.dt is not None:
        v = v * gates.dt.unsqueeze(3)

    def merge(part: Tensor) -> Tensor:
        """``[B, m, h, ...]`` -> ``[B, 1, m * h, ...]``."""
        return part.expand(part.shape[0], memories, *part.shape[2:]).flatten(1, 2).unsqueeze(1)

    g, beta = (None if gate is None else merge(gate) for gate in (gates.g, gates.beta))
    wide = state.flatten(1, 2).float()
    o, final_state = linear_attention(rule, merge(q), merge(k), merge(v), g, beta, wide, args.scale)
    return o.view(-1, memories, value_heads * value_dim), final_state.to(state.dtype).view(state.shape)


def _read(args: Arguments, o: Tensor, weights: Tensor) -> Tensor:
    """The sum of what the memories gave, by the weights ``[B, m]``: ``[B, 1, HV, V]``."""
    value_heads, value_dim = args.recurrent_state.shape[2], args.recurrent_state.shape[4]
    return (weights.unsqueeze(1) @ o).unflatten(2, (value_heads, value_dim)).to(args.q.dtype)
