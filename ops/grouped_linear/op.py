"""Registration of ``mom::grouped_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch, on_gpu
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(x: Tensor, weight: Tensor, group_offset: Tensor) -> None:
    check_rank("x", x, "[S, D]")
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (None, None, x.shape[1]), "[G, N, D]")
    check_dtype("weight", weight, (x.dtype,))
    check_shape("group_offset", group_offset, (weight.shape[0] + 1,), "[G+1]")
    check_dtype("group_offset", group_offset, (torch.int32,))
    check_same_device("x", x, weight=weight, group_offset=group_offset)


def _check_offsets(rows: int, group_offset: Tensor) -> None:
    bounds = group_offset.tolist()
    if bounds[0] != 0 or bounds[-1] > rows or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(
            f"group_offset must rise from 0 to at most the number of rows ({rows}), got {bounds}; "
            "use the group_offset of a dispatch plan"
        )


def _fake(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    _check(x, weight, group_offset)
    return x.new_empty(x.shape[0], weight.shape[1])


def _cpu(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    _check(x, weight, group_offset)
    _check_offsets(x.shape[0], group_offset)
    return cpu.grouped_linear_fwd(x, weight, group_offset)


def _triton(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    _check(x, weight, group_offset)
    if not on_gpu(x):
        _check_offsets(x.shape[0], group_offset)
    return launch.grouped_linear_fwd(x, weight, group_offset.contiguous())


def _dweight_check(dy: Tensor, x: Tensor, group_offset: Tensor) -> None:
    check_rank("x", x, "[S, D]")
    check_shape("dy", dy, (x.shape[0], None), "[S, N]")
    check_rank("group_offset", group_offset, "[G+1]")


def _dweight_fake(dy: Tensor, x: Tensor, group_offset: Tensor) -> Tensor:
    _dweight_check(dy, x, group_offset)
    return x.new_empty(group_offset.shape[0] - 1, dy.shape[1], x.shape[1])


def _dweight_cpu(dy: Tensor, x: Tensor, group_offset: Tensor) -> Tensor:
    _dweight_check(dy, x, group_offset)
    _check_offsets(x.shape[0], group_offset)
    return cpu.grouped_linear_dweight(dy, x, group_offset)


def _dweight_triton(dy: Tensor, x: Tensor, group_offset: Tensor) -> Tensor:
    _dweight_check(dy, x, group_offset)
    if not on_gpu(x):
        _check_offsets(x.shape[0], group_offset)
    return launch.grouped_linear_dweight(dy, x, group_offset.contiguous())


grouped_linear_dweight = register_op(
    "grouped_linear_dweight",
    "(Tensor dy, Tensor x, Tensor group_offset) -> Tensor",
    fake=_dweight_fake,
    cpu=_dweight_cpu,
    triton=_dweight_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, group_offset = ctx.saved_tensors
    dx = grouped_linear(dy, weight.transpose(1, 2), group_offset) if ctx.needs_input_grad[0] else None
    dweight = grouped_linear_dweight(dy, x, group_offset) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


grouped_linear = register_op(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor group_offset) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight"),
)
