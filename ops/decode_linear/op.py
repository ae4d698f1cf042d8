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

INPUTS = ("plain", "rms_norm", "gated_rms_norm", "swiglu")


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
) -> None:
    if input not in INPUTS:
        raise ValueError(f"input must be one of {', '.join(INPUTS)}, got {input!r}; choose one of them")
    check_rank("weight", weight, "[O, F]")
    features = weight.shape[1]
    check_shape("x", x, (None, features * (1 + (input == "swiglu"))), "[N, F], [N, 2 F] for swiglu")
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, (x.dtype,))
    if (norm_weight is not None) != input.endswith("rms_norm"):
        rule, got = ("be given", "None") if norm_weight is None else ("be None", "a tensor")
        raise ValueError(f"norm_weight must {rule} with input {input}, got {got}; only the norms have a weight")
    if norm_weight is not None:
        check_rank("norm_weight", norm_weight, "[V]")
        check_dtype("norm_weight", norm_weight, (x.dtype,))
        size = norm_weight.shape[0]
        if size == 0 or features % size or (input == "rms_norm" and size != features):
            raise ValueError(
                f"norm_weight must be [V] with V = F = {features}, or a divisor of F for gated_rms_norm, got shape "
                f"{tuple(norm_weight.shape)}; pass the weight of this norm"
            )
    if gate is not None:
        if input != "gated_rms_norm":
            raise ValueError(f"gate must be None with input {input}, got a tensor; only gated_rms_norm has a gate")
        check_shape("gate", gate, tuple(x.shape), "[N, F]")
        check_dtype("gate", gate, (x.dtype,))
    if small_weight is not None:
        check_shape("small_weight", small_weight, (None, features), "[P, F]")
        check_dtype("small_weight", small_weight, (torch.promote_types(x.dtype, torch.float32),))
    others = {"norm_weight": norm_weight, "gate": gate, "small_weight": small_weight}
    check_same_device("x", x, weight=weight, **others)


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(x, weight, *rest)
    small = rest[2]
    return (
        x.new_empty(x.shape[0], weight.shape[0]),
        x.new_empty(0) if small is None else small.new_empty(x.shape[0], small.shape[0]),
    )


def _functional(run: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    _check(*args)
    return run(*args)


def _check_in_place(
    residual: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor | None, gate: Tensor | None, input: str, eps: float
) -> tuple[Any, ...]:
    args = (x, weight, norm_weight, gate, None, input, eps)
    _check(*args)
    check_shape("residual", residual, (x.shape[0], weight.shape[0]), "[N, O]")
    check_dtype("residual", residual, (x.dtype,))
    check_same_device("x", x, residual=residual)
    if not residual.is_contiguous():
        raise ValueError("residual must be contiguous to be updated in place, got a strided one; call .contiguous()")
    return args


def _in_place(run: Any, values: tuple[Any, ...]) -> None:
    run(*_check_in_place(*values), values[0])


decode_linear = register_op(
    "decode_linear",
    "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? gate, Tensor? small_weight, str input, float eps) -> "
    "(Tensor y, Tensor small)",
    fake=_fake,
    cpu=lambda *args: _functional(cpu.decode_linear, args),
    triton=lambda *args: _functional(launch.decode_linear, args),
)
decode_linear_in_place = register_op(
    "decode_linear_",
    "(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? gate, str input, float eps) -> ()",
    mutates_args=("residual",),
    fake=lambda *args: _check_in_place(*args) and None,
    cpu=lambda *args: _in_place(cpu.decode_linear, args),
    triton=lambda *args: _in_place(launch.decode_linear, args),
)
