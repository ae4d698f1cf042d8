"""Registration of ``mom::linear_cross_entropy``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._tensors import wide
from .._triton import LazyLaunch, on_gpu
from . import cpu

launch = LazyLaunch(__package__ or "")

Three = tuple[Tensor, Tensor, Tensor]


def _check(x: Tensor, weight: Tensor, target: Tensor) -> None:
    check_rank("x", x, "[T, D]")
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (None, x.shape[1]), "[V, D]")
    check_dtype("weight", weight, (x.dtype,))
    check_shape("target", target, (x.shape[0],), "[T]")
    check_dtype("target", target, (torch.int64,))
    check_same_device("x", x, weight=weight, target=target)


def _check_values(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"target must lie in [0, {vocabulary}) or be {ignore_index}, got {int(target[bad][0])}; "
            "the text was tokenized for another model"
        )


def _fake(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, grads: bool) -> Three:
    _check(x, weight, target)
    return (
        x.new_empty((), dtype=wide(x.dtype)),
        x.new_empty(x.shape if grads else (0,)),
        weight.new_empty(weight.shape if grads else (0,)),
    )


def _cpu(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, grads: bool) -> Three:
    _check(x, weight, target)
    _check_values(target, weight.shape[0], ignore_index)
    return cpu.linear_cross_entropy_fwd(x, weight, target, ignore_index, grads)


def _triton(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, grads: bool) -> Three:
    _check(x, weight, target)
    if not on_gpu(x):
        _check_values(target, weight.shape[0], ignore_index)
    return launch.linear_cross_entropy_fwd(
        x.contiguous(), weight.contiguous(), target.contiguous(), ignore_index, grads
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.grads = inputs[4]


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    if dloss is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph: the gradients below would pass for constants
        raise RuntimeError(
            "mom::linear_cross_entropy must be differentiated once, got create_graph=True; use "
            "torch.nn.functional.cross_entropy for second derivatives"
        )
    if not ctx.grads:
        raise ValueError("grads must be True where the loss is differentiated, got False; pass grads=True")
    dx, dweight = ctx.saved_tensors
    return (
        dx * dloss if ctx.needs_input_grad[0] else None,
        dweight * dloss if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


linear_cross_entropy = register_op(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor target, int ignore_index, bool grads) -> "
    "(Tensor loss, Tensor dx, Tensor dweight)",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight"),
)
