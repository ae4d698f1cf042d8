"""The dispatch plan built token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import CHUNK, rows_bound


def dispatch_reference(
    indices: Tensor,
    cu_seqlens: Tensor,
    valid: Tensor | None,
    num_memories: int,
    shared: bool,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same arguments and results as :func:`mom_compile.ops.dispatch`, by plain Python loops."""
    tokens, topk = indices.shape
    bounds = cu_seqlens.tolist()
    sequences = len(bounds) - 1
    memories, choices = num_memories + shared, topk + shared
    rows = rows_bound(tokens, topk, sequences, num_memories, shared, chunk_size)
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for n in range(sequences):
        for t in range(bounds[n], bounds[n + 1]):
            if valid is not None and not bool(valid[t]):
                continue
            seen: set[int] = set()
            for j, memory in enumerate(indices[t].tolist()):
                if 0 <= memory < num_memories and memory not in seen:
                    members.setdefault((memory, n), []).append((t, j))
                    seen.add(memory)
            if shared:
                members.setdefault((num_memories, n), []).append((t, topk))
    slot_of = torch.full((tokens, choices), -1, dtype=torch.int32)
    entry_of = torch.full((rows,), -1, dtype=torch.int32)
    start = torch.zeros(sequences * memories, dtype=torch.int32)
    length = torch.zeros(sequences * memories, dtype=torch.int32)
    chunk_segment = torch.full((rows // chunk_size,), -1, dtype=torch.int32)
    group_offset = torch.zeros(memories + 1, dtype=torch.int32)
    row = 0
    for memory in range(memories):
        group_offset[memory] = row
        for n in range(sequences):
            segment = n * memories + memory
            start[segment] = row
            entries = members.get((memory, n), [])
            length[segment] = len(entries)
            for offset, (t, j) in enumerate(entries):
                slot_of[t, j] = row + offset
                entry_of[row + offset] = t * choices + j
            for chunk in range(0, len(entries), chunk_size):
                chunk_segment[(row + chunk) // chunk_size] = segment
            row += -(-len(entries) // chunk_size) * chunk_size
    group_offset[memories] = row
    return slot_of, entry_of, start, length, chunk_segment, group_offset
