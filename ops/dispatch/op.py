"""Registration of ``mom::dispatch``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import INTEGERS, check_dtype, check_range, check_rank, check_same_device, check_shape
from .._layout import rows_bound
from .._library import register_op
from .._triton import LazyLaunch, on_gpu
from . import cpu

launch = LazyLaunch(__package__ or "")

Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(
    indices: Tensor, cu_seqlens: Tensor, valid: Tensor | None, num_memories: int, shared: bool, chunk_size: int
) -> None:
    check_rank("indices", indices, "[T, k]")
    check_dtype("indices", indices, INTEGERS)
    check_rank("cu_seqlens", cu_seqlens, "[N+1]")
    check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must be [N+1], got shape (0,); start it with 0")
    if valid is not None:
        check_shape("valid", valid, (indices.shape[0],), "[T]")
        check_dtype("valid", valid, (torch.bool,))
    check_range("num_memories", num_memories, indices.shape[1], None, "it must not be below topk")
    check_range("chunk_size", chunk_size, 1, None, "64 is what the kernels take")
    check_same_device("indices", indices, cu_seqlens=cu_seqlens, valid=valid)


def _fake(
    indices: Tensor, cu_seqlens: Tensor, valid: Tensor | None, num_memories: int, shared: bool, chunk_size: int
) -> Plan:
    _check(indices, cu_seqlens, valid, num_memories, shared, chunk_size)
    tokens, topk = indices.shape
    sequences, memories = cu_seqlens.shape[0] - 1, num_memories + int(shared)
    rows = rows_bound(tokens, topk, sequences, num_memories, shared, chunk_size)

    def empty(*size: int) -> Tensor:
        return indices.new_empty(size, dtype=torch.int32)

    return (
        empty(tokens, topk + int(shared)),
        empty(rows),
        empty(sequences * memories),
        empty(sequences * memories),
        empty(rows // chunk_size),
        empty(memories + 1),
    )


def _check_values(indices: Tensor, cu_seqlens: Tensor, num_memories: int) -> None:
    """Values, on the CPU only: reading them on a GPU would stall it."""
    tokens = indices.shape[0]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {shown}; "
            "pass cumulative document lengths, repeats for empty documents"
        )
    if indices.numel() and not bool(((indices >= 0) & (indices < num_memories)).all()):
        raise ValueError(
            f"indices must lie in [0, {num_memories}), got {int(indices.min())} to {int(indices.max())}; "
            "use the indices that route returns"
        )
    if indices.shape[1] > 1:
        ordered = indices.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("indices must name different memories for one token, got a repeated one; drop repeats")


def _cpu(
    indices: Tensor, cu_seqlens: Tensor, valid: Tensor | None, num_memories: int, shared: bool, chunk_size: int
) -> Plan:
    _check(indices, cu_seqlens, valid, num_memories, shared, chunk_size)
    if not on_gpu(indices):
        _check_values(indices, cu_seqlens, num_memories)
    return cpu.dispatch(indices.long(), cu_seqlens, valid, num_memories, shared, chunk_size)


def _triton(
    indices: Tensor, cu_seqlens: Tensor, valid: Tensor | None, num_memories: int, shared: bool, chunk_size: int
) -> Plan:
    _check(indices, cu_seqlens, valid, num_memories, shared, chunk_size)
    if not on_gpu(indices):
        _check_values(indices, cu_seqlens, num_memories)
    return launch.dispatch(
        indices.long().contiguous(), cu_seqlens.long().contiguous(), valid, num_memories, shared, chunk_size
    )


dispatch = register_op(
    "dispatch",
    "(Tensor indices, Tensor cu_seqlens, Tensor? valid, int num_memories, bool shared, int chunk_size) -> "
    "(Tensor slot_of, Tensor entry_of, Tensor segment_start, Tensor segment_length, Tensor chunk_segment, "
    "Tensor group_offset)",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
)
