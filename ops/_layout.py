"""The aligned row layout: segments of tokens that start at multiples of one chunk (see ``DispatchPlan``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_dtype, check_rank, check_shape

CHUNK = 64
"""Rows of one chunk, and the alignment of every segment."""


def rows_bound(tokens: int, topk: int, sequences: int, num_memories: int, shared: bool, chunk_size: int = CHUNK) -> int:
    """Rows that always suffice: every segment is rounded up to whole chunks."""
    rows = chunk_size * ((tokens * topk + sequences * num_memories * (chunk_size - 1)) // chunk_size)
    if shared:
        rows += chunk_size * ((tokens + sequences * (chunk_size - 1)) // chunk_size)
    return rows


def row_mask(segment_start: Tensor, segment_length: Tensor, chunk_segment: Tensor) -> Tensor:
    """``[S]`` bool: true on rows that hold a token. Static shapes, no host reads."""
    segment = chunk_segment.long()
    position = torch.arange(CHUNK, device=segment.device)
    first = torch.arange(segment.shape[0], device=segment.device) * CHUNK
    safe = segment.clamp(min=0)
    if segment_start.shape[0] == 0:
        return torch.zeros(segment.shape[0] * CHUNK, dtype=torch.bool, device=segment.device)
    left = segment_length.long()[safe] - (first - segment_start.long()[safe])
    return ((position < left.unsqueeze(1)) & (segment >= 0).unsqueeze(1)).flatten()


def check_segments(rows: int, segment_start: Tensor, segment_length: Tensor, chunk_segment: Tensor) -> None:
    """The tables of the aligned layout, as ``mom::dispatch`` makes them."""
    check_rank("segment_start", segment_start, "[NS]")
    check_shape("segment_length", segment_length, (segment_start.shape[0],), "[NS]")
    check_shape("chunk_segment", chunk_segment, (rows // CHUNK,), "[S/64]")
    if rows % CHUNK:
        raise ValueError(f"the rows must be a multiple of {CHUNK}, got {rows}; place them with dispatch and permute")
    for name, table in (
        ("segment_start", segment_start),
        ("segment_length", segment_length),
        ("chunk_segment", chunk_segment),
    ):
        check_dtype(name, table, (torch.int32,))
