"""Registration of ``mom::combine_norm``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._checks import check_dtype, check_same_device, check_shape
from .._library import register_op
from .._tensors import contiguous
from .._triton import LazyLaunch
from ..combine.op import check as check_combine
from . import cpu

launch = LazyLaunch(__package__ or "")

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(
    o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor, gate: Tensor, norm_weight: Tensor, eps: float
) -> None:
    check_combine(o, weights, slot_of, entry_of)
    check_shape("gate", gate, (slot_of.shape[0], o.shape[1], o.shape[2]), "[T, HV, V]")
    check_dtype("gate", gate, (o.dtype,))
    check_shape("norm_weight", norm_weight, (o.shape[2],), "[V]")
    check_same_device("o", o, gate=gate, norm_weight=norm_weight)


def _fake(
    o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor, gate: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    _check(o, weights, slot_of, entry_of, gate, norm_weight, eps)
    return gate.new_empty(gate.shape)


def _cpu(*args: Any) -> Tensor:
    _check(*args)
    return cpu.combine_norm_fwd(*args)


def _triton(*args: Any) -> Tensor:
    _check(*args)
    return launch.combine_norm_fwd(*contiguous(*args))


def _bwd_fake(dy: Tensor, o: Tensor, *rest: Any) -> Four:
    _check(o, *rest)
    weights, _, _, gate, norm_weight, _ = rest
    check_shape("dy", dy, tuple(gate.shape), "[T, HV, V]")
    return tuple(x.new_empty(x.shape) for x in (o, weights, gate, norm_weight))  # type: ignore[return-value]


def _bwd_triton(*args: Any) -> Four:
    return launch.combine_norm_bwd(*contiguous(*args))


combine_norm_bwd = register_op(
    "combine_norm_bwd",
    "(Tensor dy, Tensor o, Tensor weights, Tensor slot_of, Tensor entry_of, Tensor gate, Tensor norm_weight, "
    "float eps) -> (Tensor do, Tensor dweights, Tensor dgate, Tensor dnorm_weight)",
    fake=_bwd_fake,
    cpu=cpu.combine_norm_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.eps = inputs[6]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    do, dweights, dgate, dnorm_weight = combine_norm_bwd(dy, *ctx.saved_tensors, ctx.eps)
    return do, dweights, None, None, dgate, dnorm_weight, None


combine_norm = register_op(
    "combine_norm",
    "(Tensor o, Tensor weights, Tensor slot_of, Tensor entry_of, Tensor gate, Tensor norm_weight, float eps) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("o", "gate"),
)
