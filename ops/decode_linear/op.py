"""Registration of ``mom::decode_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    small_weight: Tensor | None = None,
    norm: bool = False,
    swiglu: bool = False,
    eps: float = 1e-6,
) -> None:
    check_rank("weight", weight, "[O, F]")
    features = weight.shape[1]
    check_shape("x", x, (None, features), "[N, F]")
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, (x.dtype,))
    if swiglu and weight.shape[0] % 2:
        raise ValueError(
            f"weight must have an even number of rows with swiglu, got {weight.shape[0]}; lay the gate's over the up's"
        )
    if norm_weight is not None:
        if not norm:
            raise ValueError("norm_weight must be None without norm, got a tensor; pass norm=True")
        check_shape("norm_weight", norm_weight, (features,), "[F]")
        check_dtype("norm_weight", norm_weight, (x.dtype,))
    if small_weight is not None:
        check_shape("small_weight", small_weight, (None, features), "[P, F]")
        check_dtype("small_weight", small_weight, (torch.promote_types(x.dtype, torch.float32),))
    check_same_device("x", x, weight=weight, norm_weight=norm_weight, small_weight=small_weight)


def _fake(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    small_weight: Tensor | None,
    norm: bool,
    swiglu: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, norm_weight, small_weight, norm, swiglu, eps)
    return (
        x.new_empty(x.shape[0], weight.shape[0] // (1 + swiglu)),
        x.new_empty(0) if small_weight is None else small_weight.new_empty(x.shape[0], small_weight.shape[0]),
    )


def _functional(run: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    _check(*args)
    return run(*args)


def _check_in_place(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    _check(x, weight)
    check_shape("residual", residual, (x.shape[0], weight.shape[0]), "[N, O]")
    check_dtype("residual", residual, (x.dtype,))
    check_same_device("x", x, residual=residual)
    if not residual.is_contiguous():
        raise ValueError("residual must be contiguous to be updated in place, got a strided one; call .contiguous()")


def _in_place(run: Any, residual: Tensor, x: Tensor, weight: Tensor) -> None:
    _check_in_place(residual, x, weight)
    run(x, weight, None, None, False, False, 0.0, residual)


decode_linear = register_op(
    "decode_linear",
    "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? small_weight, bool norm, bool swiglu, float eps) -> "
    "(Tensor y, Tensor small)",
    fake=_fake,
    cpu=lambda *args: _functional(cpu.decode_linear, args),
    triton=lambda *args: _functional(launch.decode_linear, args),
)
decode_linear_in_place = register_op(
    "decode_linear_",
    "(Tensor(a!) residual, Tensor x, Tensor weight) -> ()",
    mutates_args=("residual",),
    fake=_check_in_place,
    cpu=lambda *args: _in_place(cpu.decode_linear, *args),
    triton=lambda *args: _in_place(launch.decode_linear, *args),
)
