"""Registration of ``mom::permute``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> None:
    check_rank("x", x, "[T, F]")
    check_dtype("x", x, FLOATS)
    check_shape("slot_of", slot_of, (x.shape[0], None), "[T, k']")
    check_rank("entry_of", entry_of, "[S]")
    check_dtype("slot_of", slot_of, (torch.int32,))
    check_dtype("entry_of", entry_of, (torch.int32,))
    check_same_device("x", x, slot_of=slot_of, entry_of=entry_of)


def _fake(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    _check(x, slot_of, entry_of)
    return x.new_empty(entry_of.shape[0], x.shape[1])


def _cpu(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    _check(x, slot_of, entry_of)
    return cpu.permute_fwd(x, slot_of, entry_of)


def _triton(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    _check(x, slot_of, entry_of)
    return launch.permute_fwd(x.contiguous(), slot_of.contiguous(), entry_of.contiguous())


def _bwd_check(drows: Tensor, slot_of: Tensor) -> None:
    check_rank("drows", drows, "[S, F]")
    check_rank("slot_of", slot_of, "[T, k']")
    check_same_device("drows", drows, slot_of=slot_of)


def _bwd_fake(drows: Tensor, slot_of: Tensor) -> Tensor:
    _bwd_check(drows, slot_of)
    return drows.new_empty(slot_of.shape[0], drows.shape[1])


def _bwd_triton(drows: Tensor, slot_of: Tensor) -> Tensor:
    _bwd_check(drows, slot_of)
    return launch.permute_bwd(drows.contiguous(), slot_of.contiguous())


permute_bwd = register_op(
    "permute_bwd",
    "(Tensor drows, Tensor slot_of) -> Tensor",
    fake=_bwd_fake,
    cpu=cpu.permute_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
    (slot_of,) = ctx.saved_tensors
    return permute_bwd(drows, slot_of), None, None


permute = register_op(
    "permute",
    "(Tensor x, Tensor slot_of, Tensor entry_of) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
