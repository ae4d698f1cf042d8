"""What replaces the ``mom`` operators in an exported program, per target.

The portable form of the layer holds three of them: ``mom::route``, ``mom::gated_rms_norm`` and one
``mom::recurrent_<rule>`` on ``[B, T, M' * H, K]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch.nn import functional as F

from ..ops import CHUNK, RULES
from ..ops._launch import Launch, instead_of_launches
from ..ops._library import TRITON_IMPLEMENTATIONS
from ..ops.memory_rule import Rule
from . import microsoft_nodes
from .microsoft_nodes import causal_conv, linear_attention
from .token_nodes import masked_step

Lowering = Callable[..., Any]
RuleLowering = Callable[..., tuple[Tensor, Tensor]]


def _route(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    # ONNX TopK takes the lowest index among equals.
    values, indices = torch.topk(logits, topk, -1)
    return torch.softmax(values, -1), indices


def _route_by_sort(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    # torch.topk promises no order among equals; a stable sort keeps the lowest index first.
    values, indices = torch.sort(logits, stable=True, dim=-1, descending=True)
    return torch.softmax(values[..., :topk], -1), indices[..., :topk]


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Over the last axis, divided by the root: ONNX Runtime fuses that, and not the product with its inverse."""
    dtype, x = x.dtype, x.float()
    assert len(normalized_shape) == 1 and weight is not None and eps is not None
    return (x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)


def _gated_rms_norm(norm: Lowering, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (norm(x.float(), x.shape[-1:], weight.float(), eps) * F.silu(gate.float())).to(x.dtype)


def _cumsum(x: Tensor, dim: int) -> Tensor:
    # TensorRT has no whole-number CumSum; float32 counts up to 2^24 exactly.
    if x.dtype == torch.int64:
        return torch.cumsum(x.to(torch.float32), dim).to(torch.int64)
    return torch.cumsum(x, dim)


def _conv1d(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    # ONNX has no bfloat16 Conv before opset 22.
    if x.dtype == torch.bfloat16:
        return torch.conv1d(x.float(), weight.float(), *rest, **options).to(x.dtype)
    return torch.conv1d(x, weight, *rest, **options)


def _depthwise_conv(x: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """A depthwise convolution over ``[B, C, W-1 + T]`` as one CausalConvWithState node.

    Its own new state is left unused: where tokens of a memory end is known to the layer alone.
    """
    past = weight.shape[2] - 1
    return causal_conv(x[:, :, past:], weight, x[:, :, :past])[0]


def one_token(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The rule for T = 1 in plain operators, in the dtype of the state: reading it takes longer than the sums."""
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).to(state.dtype) for x in (q, k, v))  # [B, h, 1, d]
    if g is not None:
        state = state * g.transpose(1, 2).unsqueeze(-1).exp()
    update = v if beta is None else beta.transpose(1, 2).unsqueeze(-1) * (v - k @ state)
    state = state + k.transpose(2, 3) @ update
    return ((q * scale) @ state).transpose(1, 2).to(dtype), state


def chunked(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The rule for any T in plain operators: chunks of 64 in parallel, then a scan that carries the state.

    The decay between two tokens is summed from the tokens between them (a product of two triangular matrices), never as
    a difference of cumulative sums: after a strong decay that difference has lost the small terms.

    Below float32 the products are in the dtype of q, k and v; decay, inverse and the carried state stay float32.
    """
    length, dtype = q.shape[1], q.dtype
    padding = (CHUNK - length % CHUNK) % CHUNK

    def chunks(x: Tensor) -> Tensor:
        """``[B, T, h, d]`` -> ``[NC, B * h, C, d]``."""
        return F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    q, k, v = chunks(q * scale), chunks(k), chunks(v)
    ones = torch.ones(CHUNK, CHUNK, dtype=state.dtype, device=q.device)
    lower, strict = ones.tril(), ones.tril(-1)
    scores = (q @ k.transpose(2, 3)) * lower.to(dtype)
    k_end, q_start, k_start, total = k, q, k, None
    decay = None
    if g is not None:
        steps = chunks(g.unsqueeze(-1))  # [NC, B * h, C, 1]
        between = (lower * steps.transpose(2, 3)) @ strict  # sum of g over (j, i]
        decay = between.exp() * lower
        from_start = (lower @ steps).exp()
        to_end = between[..., -1:, :].transpose(2, 3).exp().to(dtype)
        total = from_start[..., -1:, :]
        scores, k_end = scores * decay.to(dtype), k * to_end
        q_start, k_start = q * from_start.to(dtype), k * from_start.to(dtype)
    if beta is None:
        xs = [q_start, scores, k_end, v]
    else:
        strength = chunks(beta.unsqueeze(-1))
        gram = (k @ k.transpose(2, 3)).to(state.dtype) * strength * strict
        inverse = _block_inverse(gram if decay is None else gram * decay).to(dtype)
        strength = strength.to(dtype)
        xs = [q_start, scores, k_end, v * strength, k_start * strength, inverse]
    if total is not None:
        xs.append(total)

    def body(carry: Tensor, *rest: Tensor) -> list[Tensor]:
        q_start, scores, k_end, v_new = rest[:4]
        before = carry.to(dtype)
        if beta is not None:
            v_new = torch.bmm(rest[5], v_new - torch.bmm(rest[4], before))
        o = torch.bmm(q_start, before) + torch.bmm(scores, v_new)
        decayed = carry if total is None else carry * rest[-1]
        return [decayed + torch.bmm(k_end.transpose(1, 2), v_new).to(carry.dtype), o]

    # The operator itself: torch's scan() would run Dynamo, which has no ranges for these sizes.
    # Three axes and bmm in its body: a matmul of four would capture the batch size, which the converter refuses.
    batch, heads = state.shape[:2]
    state, o = scan_op(body, [state.flatten(0, 1)], xs, additional_inputs=())
    o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return o, state.unflatten(0, (batch, heads))


def looped(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The rule for any T in plain operators, as :func:`chunked` with all of a chunk's work inside the scan.

    What is outside has sizes in which the length is divided and rounded, over which Inductor's code generator takes
    minutes. The triangular system is solved by substitution.
    """
    batch, length, heads, value_dim = v.shape
    count = (length + CHUNK - 1) // CHUNK

    def chunks(x: Tensor) -> Tensor:
        """``[B, T, h, d]`` -> ``[NC, B * h, C, d]``."""
        padded = F.pad(x, (0, 0, 0, 0, 0, count * CHUNK - length))
        return padded.unflatten(1, (count, CHUNK)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    xs = [chunks(q * scale), chunks(k), chunks(v)]
    xs += [chunks(gate.unsqueeze(-1)) for gate in (g, beta) if gate is not None]
    ones = torch.ones(CHUNK, CHUNK, dtype=q.dtype, device=q.device)

    def body(carry: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
        gates, (lower, strict) = list(rest[:-5]), rest[-5:-3]
        steps = gates.pop(0) if g is not None else None  # [B * h, C, 1]
        strength = gates.pop(0) if beta is not None else None
        keys = k.transpose(1, 2)
        k_end, decayed, decay = k, carry, lower
        k_start = k
        if steps is not None:
            decay = ((lower * steps.transpose(1, 2)) @ strict).exp() * lower  # summed over (j, i], as in chunked
            from_start = steps.cumsum(1).exp()
            q_start, k_start = q * from_start, k * from_start
            k_end = k * decay[:, -1:].transpose(1, 2)
            decayed = carry * from_start[:, -1:]
        else:
            q_start = q
        if strength is not None:
            system = torch.bmm(k, keys) * strength * decay * strict
            v = strength * (v - torch.bmm(k_start, carry))
            v = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        o = torch.bmm(q_start, carry) + torch.bmm(torch.bmm(q, keys) * decay, v)
        return [decayed + torch.bmm(k_end.transpose(1, 2), v), o]

    # The sizes are inputs of their own: Inductor rebuilds from them the shape of the outputs it writes in place.
    sizes = (batch, length, count)
    state, o = scan_op(body, [state.flatten(0, 1)], xs, additional_inputs=(ones.tril(), ones.tril(-1), *sizes))
    o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    # A copy: whether the slice is contiguous depends on the length, and a view of it would ask.
    o = o.clone(memory_format=torch.contiguous_format)
    return o, state.unflatten(0, (batch, heads))


def _block_inverse(lower: Tensor) -> Tensor:
    """``(I + L)^-1`` of strictly lower triangular ``[..., C, C]`` by merging diagonal blocks of 1, 2, 4, ... rows.

    The entries stay bounded, where a Neumann doubling over the whole matrix overflows on correlated keys.
    """
    index = torch.arange(CHUNK, device=lower.device)
    inverse = torch.eye(CHUNK, dtype=lower.dtype, device=lower.device)
    result = inverse.expand_as(lower)
    size = 1
    while size < CHUNK:
        row, column = index // size, index // size
        corner = (row.unsqueeze(1) % 2 == 1) & (row.unsqueeze(1) - 1 == column)
        result = result - result @ (lower * corner.to(lower.dtype)) @ result
        size *= 2
    return result


def _rule_lowering(rule: Rule, lowering: RuleLowering) -> Lowering:
    """``mom::recurrent_<rule>`` with its own arguments -> the lowering with those of the family."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        arguments = list(rest)
        g = arguments.pop(0) if rule.gate != "none" else None
        beta = arguments.pop(0) if rule.delta else None
        state, state_indices, cu_seqlens, scale = arguments
        assert state is not None and state_indices is None and cu_seqlens is None
        groups = v.shape[2] // q.shape[2]
        if groups > 1:  # every value head gets a copy of its key head
            q, k = (x.unsqueeze(3).expand(*x.shape[:3], groups, x.shape[3]).flatten(2, 3) for x in (q, k))
        # A state of 16 bits is widened here, behind the gather of the memories that a token selected.
        o, final_state = lowering(rule, q, k, v, g, beta, state.float(), float(scale))
        return o, final_state.to(state.dtype)

    return replacement


def lowerings(target: str, decode: bool) -> dict[Any, Lowering]:
    """Operator -> replacement, under the overload and under its packet: Python code calls either."""
    own = target == "onnxruntime"
    node = target in ("onnxruntime", "opset27")
    whole = linear_attention if node else looped if target == "aoti" else chunked
    rule_lowering = one_token if decode and not node else whole
    norm = microsoft_nodes.rms_norm if own else _rms_norm
    # Over many tokens the one node is slow on the CPU: its SiLU is not vectorised.
    gated_norm = microsoft_nodes.gated_rms_norm if own and decode else partial(_gated_rms_norm, norm)
    table: dict[Any, Lowering] = {
        torch.ops.mom.route: _route_by_sort if target == "aoti" else _route,
        torch.ops.mom.gated_rms_norm: gated_norm,
    }
    if own and decode:
        table[torch.ops.mom.decode_step] = masked_step
    for rule in RULES.values():
        table[getattr(torch.ops.mom, f"recurrent_{rule.op}")] = _rule_lowering(rule, rule_lowering)
    table |= {packet.default: replacement for packet, replacement in table.items()}
    table |= {F.rms_norm: norm, torch.rms_norm: norm}
    if target == "tensorrt":
        table[torch.Tensor.cumsum] = _cumsum
    if target != "aoti":
        table[torch.conv1d] = _depthwise_conv if target == "opset27" else _conv1d
    return table


@contextmanager
def kernels() -> Iterator[dict[Any, Lowering]]:
    """Operator -> its Triton implementation, whose launches are nodes of the graph traced meanwhile."""
    with instead_of_launches(Launch.trace):
        yield {
            name: implementation
            for overload, implementation in TRITON_IMPLEMENTATIONS.items()
            for name in (overload, overload.overloadpacket)
        }
