"""Registration of ``mom::gate_rows``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_dtype, check_range, check_rank, check_same_device, check_shape
from .._layout import CHUNK
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check_tables(slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> None:
    check_rank("entry_of", entry_of, "[S]")
    check_shape("chunk_segment", chunk_segment, (entry_of.shape[0] // CHUNK,), "[S/64]")
    for name, table in (("slot_of", slot_of), ("entry_of", entry_of), ("chunk_segment", chunk_segment)):
        check_dtype(name, table, (torch.int32,))


def _check(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> None:
    check_rank("gates", gates, "[T, G, n, HV]")
    check_dtype("gates", gates, (torch.float32, torch.float64))
    check_range("gates", gates.shape[1], 1, None, "it must hold the gates of at least one group")
    check_shape("slot_of", slot_of, (gates.shape[0], None), "[T, k']")
    _check_tables(slot_of, entry_of, chunk_segment)
    check_same_device("gates", gates, slot_of=slot_of, entry_of=entry_of, chunk_segment=chunk_segment)


def _fake(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> Tensor:
    _check(gates, slot_of, entry_of, chunk_segment)
    return gates.new_empty(gates.shape[2], entry_of.shape[0], gates.shape[3])


def _cpu(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> Tensor:
    _check(gates, slot_of, entry_of, chunk_segment)
    return cpu.gate_rows_fwd(gates, slot_of, entry_of, chunk_segment)


def _triton(gates: Tensor, *tables: Tensor) -> Tensor:
    _check(gates, *tables)
    return launch.gate_rows_fwd(gates.contiguous(), *(table.contiguous() for table in tables))


def _bwd_check(drows: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor, groups: int) -> None:
    check_shape("drows", drows, (None, entry_of.shape[0], None), "[n, S, HV]")
    check_rank("slot_of", slot_of, "[T, k']")
    _check_tables(slot_of, entry_of, chunk_segment)


def _bwd_fake(drows: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor, groups: int) -> Tensor:
    _bwd_check(drows, slot_of, entry_of, chunk_segment, groups)
    return drows.new_empty(slot_of.shape[0], groups, drows.shape[0], drows.shape[2])


def _bwd_triton(drows: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor, groups: int) -> Tensor:
    _bwd_check(drows, slot_of, entry_of, chunk_segment, groups)
    return launch.gate_rows_bwd(drows.contiguous(), slot_of.contiguous(), chunk_segment.contiguous(), groups)


gate_rows_bwd = register_op(
    "gate_rows_bwd",
    "(Tensor drows, Tensor slot_of, Tensor entry_of, Tensor chunk_segment, int groups) -> Tensor",
    fake=_bwd_fake,
    cpu=cpu.gate_rows_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.groups = inputs[0].shape[1]


def _backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None, None]:
    return gate_rows_bwd(drows, *ctx.saved_tensors, ctx.groups), None, None, None


gate_rows = register_op(
    "gate_rows",
    "(Tensor gates, Tensor slot_of, Tensor entry_of, Tensor chunk_segment) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
