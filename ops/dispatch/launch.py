"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import Config, bits, cdiv, launch, next_power_of_2, variant
from .._layout import CHUNK, rows_bound
from .kernels import (
    CHUNK_BLOCK,
    FILL,
    bound_kernel,
    chunk_kernel,
    count_kernel,
    place_kernel,
    scan_kernel,
    segment_kernel,
)


def _token_config(memories: int, topk: int, shared: bool) -> Config:
    """Of the kernels that walk over tokens: they must agree on the block."""
    block_m = next_power_of_2(max(memories + shared, 2))
    block_t = min(max(4096 // block_m, 16), 128)
    return Config({"M": memories, "TOPK": topk, "SHARED": int(shared), "BLOCK_T": block_t, "BLOCK_M": block_m})


def _segment_config(memories: int, chunk_size: int) -> Config:
    return Config({"MEMORIES": memories, "CHUNK_SIZE": chunk_size})


def _chunk_config(memories: int) -> Config:
    return Config({"MEMORIES": memories})


def dispatch(
    indices: Tensor,
    cu_seqlens: Tensor,
    valid: Tensor | None,
    num_memories: int,
    shared: bool,
    chunk_size: int,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as ``mom::dispatch``; ``rows``: of the plan, whole chunks, where more are wanted than suffice."""
    tokens, topk = indices.shape
    sequences = cu_seqlens.shape[0] - 1
    memories = num_memories + int(shared)
    if rows is None:
        rows = rows_bound(tokens, topk, sequences, num_memories, shared, chunk_size)
    chunks, segments = rows // chunk_size, sequences * memories

    def empty(*size: int) -> Tensor:
        return indices.new_empty(size, dtype=torch.int32)

    slot_of, entry_of = empty(tokens, topk + int(shared)), empty(rows)
    segment_start, segment_length = empty(segments), empty(segments)
    chunk_segment, group_offset = empty(chunks), empty(memories + 1)
    if segments == 0:
        for table in (slot_of, entry_of, chunk_segment):
            table.fill_(-1)
        return slot_of, entry_of, segment_start, segment_length, chunk_segment, group_offset.zero_()

    config = _token_config(num_memories, topk, shared)
    blocks = cdiv(tokens, config.constants["BLOCK_T"])
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    block_count, block_offset = empty(memories, blocks), empty(memories, blocks + 1)
    bound_count, end_chunk = empty(sequences + 1, memories), empty(segments)
    tables = indices, mask, cu_seqlens
    launch(count_kernel, (blocks,), config, *tables, block_count, tokens, sequences, blocks)
    launch(scan_kernel, (memories,), Config({}), block_count, block_offset, blocks)
    launch(bound_kernel, (sequences + 1,), config, *tables, block_offset, bound_count, tokens, sequences, blocks)
    launch(
        segment_kernel, (1,), _segment_config(memories, chunk_size),
        bound_count, segment_start, segment_length, end_chunk, group_offset, sequences,
    )  # fmt: skip
    fills = torch.sym_max(cdiv(rows, FILL.value), cdiv(chunks, CHUNK_BLOCK.value))
    launch(
        chunk_kernel, (fills,), _chunk_config(memories),
        end_chunk, chunk_segment, entry_of, rows, chunks, sequences, bits(segments),
    )  # fmt: skip
    launch(
        place_kernel, (blocks,), config, *tables, block_offset, bound_count, segment_start, segment_length,
        slot_of, entry_of, tokens, sequences, blocks, rows, bits(sequences),
    )  # fmt: skip
    return slot_of, entry_of, segment_start, segment_length, chunk_segment, group_offset


def variants() -> Iterator[KernelVariant]:
    def integers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    yield variant(
        "any size", scan_kernel, {"block_count": "*i32", "block_offset": "*i32", **integers("blocks")}, Config({}), True
    )
    for memories, topk, shared, masked in (
        (4, 2, True, False),
        (4, 2, True, True),
        (0, 0, True, False),
        (16, 4, False, True),
        (64, 8, True, False),
    ):
        label = f"M={memories} k={topk} shared={shared} valid={masked}"
        quick = memories == 4 and masked
        config, total = _token_config(memories, topk, shared), memories + int(shared)
        tables = {"indices": "*i64", "valid": "*u8" if masked else None, "bounds": "*i64"}
        counts = integers("tokens", "sequences", "blocks")
        yield variant(label, count_kernel, {**tables, "block_count": "*i32", **counts}, config, quick)
        pointers = {"block_offset": "*i32", "bound_count": "*i32"}
        yield variant(label, bound_kernel, {**tables, **pointers, **counts}, config, quick)
        pointers |= dict.fromkeys(("segment_start", "segment_length", "slot_of", "entry_of"), "*i32")
        counts |= integers("rows", "steps")
        yield variant(label, place_kernel, {**tables, **pointers, **counts}, config, quick)
        if masked:
            continue
        names = ["bound_count", "segment_start", "segment_length", "end_chunk", "group_offset"]
        arguments = {**dict.fromkeys(names, "*i32"), **integers("sequences")}
        yield variant(label, segment_kernel, arguments, _segment_config(total, CHUNK), memories == 4)
        names = ["end_chunk", "chunk_segment", "entry_of"]
        arguments = {**dict.fromkeys(names, "*i32"), **integers("rows", "chunks", "sequences", "steps")}
        yield variant(label, chunk_kernel, arguments, _chunk_config(total), memories == 4)
