"""Registration of ``mom::gated_rms_norm``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._checks import FLOATS, check_dtype, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must be [..., V] with at least one leading axis, got shape {tuple(x.shape)}; unsqueeze it")
    check_dtype("x", x, FLOATS)
    check_shape("gate", gate, tuple(x.shape), "[..., V]")
    check_shape("weight", weight, (x.shape[-1],), "[V]")
    check_same_device("x", x, gate=gate, weight=weight)


def _fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, gate, weight, eps)
    return x.new_empty(x.shape)


def _cpu(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, gate, weight, eps)
    return cpu.gated_rms_norm_fwd(x, gate, weight, eps)


def _triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, gate, weight, eps)
    return launch.gated_rms_norm_fwd(x.contiguous(), gate.contiguous(), weight.contiguous(), eps)


def _bwd_fake(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _bwd_triton(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch.gated_rms_norm_bwd(dy.contiguous(), x.contiguous(), gate.contiguous(), weight.contiguous(), eps)


gated_rms_norm_bwd = register_op(
    "gated_rms_norm_bwd",
    "(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps) -> (Tensor dx, Tensor dgate, Tensor dweight)",
    fake=_bwd_fake,
    cpu=cpu.gated_rms_norm_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, gate, weight = ctx.saved_tensors
    return *gated_rms_norm_bwd(dy, x, gate, weight, ctx.eps), None


gated_rms_norm = register_op(
    "gated_rms_norm",
    "(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "gate"),
)
