"""Registration of ``mom::short_conv``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_range, check_rank, check_same_device, check_shape
from .._layout import check_segments
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")

ACTIVATIONS = ("silu", "none")


def _check(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> None:
    check_rank("x", x, "[S, F]")
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (x.shape[1], None), "[F, W]")
    check_range("weight", weight.shape[1], 1, 16, "its width W must be that of a short convolution")
    check_segments(x.shape[0], segment_start, segment_length, chunk_segment)
    if initial_state is not None:
        check_shape(
            "initial_state", initial_state, (segment_start.shape[0], x.shape[1], weight.shape[1] - 1), "[NS, F, W-1]"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; choose one of them")
    check_same_device("x", x, weight=weight, initial_state=initial_state, segment_start=segment_start)


def _fake(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, initial_state, segment_start, segment_length, chunk_segment, activation)
    return x.new_empty(x.shape), x.new_empty(segment_start.shape[0], x.shape[1], weight.shape[1] - 1)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    return cpu.short_conv_fwd(*args)


def _triton(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, initial_state, segment_start, segment_length, chunk_segment, activation)
    return launch.short_conv_fwd(
        x.contiguous(),
        weight.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        segment_start.contiguous(),
        segment_length.contiguous(),
        chunk_segment.contiguous(),
        activation,
    )


def _bwd_fake(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, initial_state, segment_start, segment_length, chunk_segment, activation)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _bwd_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return launch.short_conv_bwd(*(x.contiguous() if isinstance(x, Tensor) else x for x in args))


short_conv_bwd = register_op(
    "short_conv_bwd",
    "(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? initial_state, Tensor segment_start, "
    "Tensor segment_length, Tensor chunk_segment, str activation) -> "
    "(Tensor dx, Tensor dweight, Tensor dinitial_state)",
    fake=_bwd_fake,
    cpu=cpu.short_conv_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, initial_state, segment_start, segment_length, chunk_segment, activation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, initial_state, segment_start, segment_length, chunk_segment)
    ctx.activation = activation


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, initial_state, segment_start, segment_length, chunk_segment = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dinitial = short_conv_bwd(
        dy, dfinal_state, x, weight, initial_state, segment_start, segment_length, chunk_segment, ctx.activation
    )
    return dx, dweight, None if initial_state is None else dinitial, None, None, None, None


short_conv = register_op(
    "short_conv",
    "(Tensor x, Tensor weight, Tensor? initial_state, Tensor segment_start, Tensor segment_length, "
    "Tensor chunk_segment, str activation) -> (Tensor y, Tensor final_state)",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
