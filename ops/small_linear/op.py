"""Registration of ``mom::small_linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._tensors import wide
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(x: Tensor, weight: Tensor) -> None:
    check_rank("x", x, "[T, D]")
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (None, x.shape[1]), "[n, D]")
    check_dtype("weight", weight, (x.dtype,))
    check_same_device("x", x, weight=weight)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=wide(x.dtype))


def _cpu(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return cpu.small_linear_fwd(x, weight)


def _triton(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return launch.small_linear_fwd(x.contiguous(), weight.contiguous())


def _bwd_check(dy: Tensor, x: Tensor, weight: Tensor) -> None:
    _check(x, weight)
    check_shape("dy", dy, (x.shape[0], weight.shape[0]), "[T, n]")
    check_dtype("dy", dy, (wide(x.dtype),))


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _bwd_check(dy, x, weight)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _bwd_triton(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _bwd_check(dy, x, weight)
    return launch.small_linear_bwd(dy.contiguous(), x.contiguous(), weight.contiguous())


small_linear_bwd = register_op(
    "small_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight) -> (Tensor dx, Tensor dweight)",
    fake=_bwd_fake,
    cpu=cpu.small_linear_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = small_linear_bwd(dy, *ctx.saved_tensors)
    return dx, dweight


small_linear = register_op(
    "small_linear",
    "(Tensor x, Tensor weight) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
