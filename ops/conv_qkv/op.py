"""Registration of ``mom::conv_qkv``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_range, check_rank, check_same_device, check_shape
from .._layout import check_segments
from .._library import register_op
from .._tensors import contiguous
from .._triton import LazyLaunch
from ..permute.op import permute_bwd
from . import cpu

launch = LazyLaunch(__package__ or "")

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    slot_of: Tensor,
    entry_of: Tensor,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    head_dim: int,
) -> None:
    check_rank("q", q, "[T, H*K]")
    check_dtype("q", q, FLOATS)
    check_rank("kv", kv, "[S, H*K + HV*V]")
    check_dtype("kv", kv, (q.dtype,))
    if head_dim < 1 or q.shape[1] % head_dim:
        raise ValueError(f"head_dim must divide the {q.shape[1]} columns of q, got {head_dim}; pass K")
    check_range("kv", kv.shape[1], q.shape[1], None, "it must hold the columns of k, as many as q has, and those of v")
    channels = q.shape[1] + kv.shape[1]
    check_shape("weight", weight, (channels, None), "[2*H*K + HV*V, W]")
    check_range("weight", weight.shape[1], 1, 16, "its width W must be that of a short convolution")
    check_shape("slot_of", slot_of, (q.shape[0], None), "[T, k']")
    check_shape("entry_of", entry_of, (kv.shape[0],), "[S]")
    check_dtype("slot_of", slot_of, (torch.int32,))
    check_dtype("entry_of", entry_of, (torch.int32,))
    check_segments(kv.shape[0], segment_start, segment_length, chunk_segment)
    if initial_state is not None:
        expected = (segment_start.shape[0], channels, weight.shape[1] - 1)
        check_shape("initial_state", initial_state, expected, "[NS, 2*H*K + HV*V, W-1]")
    check_same_device("q", q, kv=kv, weight=weight, initial_state=initial_state, entry_of=entry_of)


def _fake(*args: Any) -> Four:
    _check(*args)
    q, kv, weight, _, _, _, segment_start, _, _, head_dim = args
    heads = q.new_empty(kv.shape[0], q.shape[1] // head_dim, head_dim)
    values = q.new_empty(kv.shape[0], kv.shape[1] - q.shape[1])
    state = q.new_empty(segment_start.shape[0], weight.shape[0], weight.shape[1] - 1)
    return heads, torch.empty_like(heads), values, state


def _cpu(*args: Any) -> Four:
    _check(*args)
    return cpu.conv_qkv_fwd(*args)


def _triton(*args: Any) -> Four:
    _check(*args)
    return launch.conv_qkv_fwd(*contiguous(*args))


def _bwd_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, dfinal_state: Tensor | None, q: Tensor, kv: Tensor, weight: Tensor, *rest: Any
) -> Four:
    initial_state = rest[0]
    return (
        q.new_empty(kv.shape[0], q.shape[1]),
        kv.new_empty(kv.shape),
        weight.new_empty(weight.shape),
        q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _bwd_triton(*args: Any) -> Four:
    return launch.conv_qkv_bwd(*contiguous(*args))


conv_qkv_bwd = register_op(
    "conv_qkv_bwd",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor? dfinal_state, Tensor q, Tensor kv, Tensor weight, "
    "Tensor? initial_state, Tensor slot_of, Tensor entry_of, Tensor segment_start, Tensor segment_length, "
    "Tensor chunk_segment, int head_dim) -> (Tensor dq_rows, Tensor dkv, Tensor dweight, Tensor dinitial_state)",
    fake=_bwd_fake,
    cpu=cpu.conv_qkv_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.head_dim = inputs[9]


def _backward(
    ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, kv, weight, initial_state, slot_of, *tables = ctx.saved_tensors
    heads = (kv.shape[0], q.shape[1] // ctx.head_dim, ctx.head_dim)
    dq, dk = (q.new_zeros(heads) if grad is None else grad for grad in (dq, dk))
    if dv is None:
        dv = q.new_zeros(kv.shape[0], kv.shape[1] - q.shape[1])
    dq_rows, dkv, dweight, dinitial = conv_qkv_bwd(
        dq, dk, dv, dfinal_state, q, kv, weight, initial_state, slot_of, *tables, ctx.head_dim
    )
    dinitial = None if initial_state is None else dinitial
    return permute_bwd(dq_rows, slot_of), dkv, dweight, dinitial, *([None] * 6)


conv_qkv = register_op(
    "conv_qkv",
    "(Tensor q, Tensor kv, Tensor weight, Tensor? initial_state, Tensor slot_of, Tensor entry_of, "
    "Tensor segment_start, Tensor segment_length, Tensor chunk_segment, int head_dim) -> "
    "(Tensor q, Tensor k, Tensor v, Tensor final_state)",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
