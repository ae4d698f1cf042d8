"""Registration of ``mom::combine``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def check(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> None:
    check_rank("o", o, "[S, HV, V]")
    check_dtype("o", o, FLOATS)
    check_rank("weights", weights, "[T, k]")
    check_dtype("weights", weights, (torch.float32, torch.float64))
    check_shape("slot_of", slot_of, (weights.shape[0], None), "[T, k']")
    if slot_of.shape[1] - weights.shape[1] not in (0, 1):
        raise ValueError(
            f"slot_of must have k or k + 1 columns for weights of k = {weights.shape[1]}, got {slot_of.shape[1]}; "
            "pass the weights that route returned with the indices of this plan"
        )
    check_shape("entry_of", entry_of, (o.shape[0],), "[S]")
    check_same_device("o", o, weights=weights, slot_of=slot_of, entry_of=entry_of)


def _fake(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    check(o, weights, slot_of, entry_of)
    return o.new_empty(slot_of.shape[0], o.shape[1], o.shape[2])


def _cpu(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    check(o, weights, slot_of, entry_of)
    return cpu.combine_fwd(o, weights, slot_of, entry_of)


def _triton(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    check(o, weights, slot_of, entry_of)
    return launch.combine_fwd(o.contiguous(), weights.contiguous(), slot_of.contiguous(), entry_of.contiguous())


def _bwd_fake(dy: Tensor, o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> tuple[Tensor, Tensor]:
    check(o, weights, slot_of, entry_of)
    check_shape("dy", dy, (slot_of.shape[0], o.shape[1], o.shape[2]), "[T, HV, V]")
    return o.new_empty(o.shape), weights.new_empty(weights.shape)


def _bwd_triton(dy: Tensor, o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> tuple[Tensor, Tensor]:
    return launch.combine_bwd(
        dy.contiguous(), o.contiguous(), weights.contiguous(), slot_of.contiguous(), entry_of.contiguous()
    )


combine_bwd = register_op(
    "combine_bwd",
    "(Tensor dy, Tensor o, Tensor weights, Tensor slot_of, Tensor entry_of) -> (Tensor do, Tensor dweights)",
    fake=_bwd_fake,
    cpu=cpu.combine_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
    do, dweights = combine_bwd(dy, *ctx.saved_tensors)
    return do, dweights, None, None


combine = register_op(
    "combine",
    "(Tensor o, Tensor weights, Tensor slot_of, Tensor entry_of) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
