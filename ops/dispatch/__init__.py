"""The static-shape plan that places routed tokens memory by memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import CHUNK, rows_bound
from .op import dispatch as _dispatch
from .reference import dispatch_reference

__all__ = ["DispatchPlan", "dispatch", "dispatch_reference", "rows_bound", "sequence_plan"]


class DispatchPlan(NamedTuple):
    """Tables of the aligned row layout, all int32. Their sizes depend on the sizes of the inputs alone.

    Segment ``n * M' + m`` holds the tokens of sequence n that selected memory m, in time order; the shared memory is
    m = M. Segments are placed memory-major and each starts at a multiple of 64 rows; the rows between are pad rows.

    Attributes:
        slot_of: ``[T, k']`` row of each token and choice, -1 where the token is masked; the shared memory comes last.
        entry_of: ``[S]`` ``t * k' + j`` of each row's token and choice, -1 for a pad row.
        segment_start: ``[N * M']`` first row of each segment.
        segment_length: ``[N * M']`` its tokens; 0 is legal.
        chunk_segment: ``[S / 64]`` segment of each chunk, -1 for an unused chunk.
        group_offset: ``[M' + 1]`` row range of each memory.
    """

    slot_of: Tensor
    entry_of: Tensor
    segment_start: Tensor
    segment_length: Tensor
    chunk_segment: Tensor
    group_offset: Tensor

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tables that the row operators take."""
        return self.segment_start, self.segment_length, self.chunk_segment


def dispatch(
    indices: Tensor,
    cu_seqlens: Tensor,
    num_memories: int,
    valid: Tensor | None = None,
    shared: bool = False,
) -> DispatchPlan:
    """Plan where each (token, selected memory) pair lies, without a sort, a host read or a data-dependent shape.

    Args:
        indices: ``[T, k]`` int64 memory of each choice, different within a token; k may be 0.
        cu_seqlens: ``[N+1]`` int, boundaries of the sequences in the flattened tokens, from 0 to T; repeats make empty
            sequences.
        num_memories: M, the routed memories.
        valid: ``[T]`` bool; tokens that are False get no row. None: all are valid.
        shared: whether one more memory takes every token.

    Returns:
        A :class:`DispatchPlan` over S rows (:func:`rows_bound`).

    Raises:
        ValueError: wrong shapes or dtypes; on the CPU also wrong values. On a GPU a wrong index gets no row.

    Source: mom-compile; the idea of segments per memory is MoM (arXiv 2502.13685) section 3.3.
    """
    return DispatchPlan(*_dispatch(indices, cu_seqlens, valid, num_memories, shared, CHUNK))


def sequence_plan(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> DispatchPlan:
    """The plan of one memory that takes every token: ``[B, T]`` input, or ``[1, T]`` packed by ``cu_seqlens``."""
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=device) * length
    return dispatch(torch.empty(batch * length, 0, dtype=torch.int64, device=device), cu_seqlens, 0, None, True)
