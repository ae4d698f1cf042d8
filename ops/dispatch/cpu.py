"""The dispatch plan in PyTorch: counting instead of sorting, every size static, no host reads on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import rows_bound


def dispatch(
    indices: Tensor, cu_seqlens: Tensor, valid: Tensor | None, num_memories: int, shared: bool, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, topk = indices.shape
    sequences = cu_seqlens.shape[0] - 1
    memories, choices = num_memories + int(shared), topk + int(shared)
    rows = rows_bound(tokens, topk, sequences, num_memories, shared, chunk_size)
    device = indices.device
    bounds = cu_seqlens.long().clamp(0, tokens)

    # member[t, m]: the choice with which token t selects memory m, or -1; the first of repeated choices counts.
    member = torch.full((tokens, memories + 1), -1, dtype=torch.int64, device=device)
    keep = torch.arange(tokens, device=device)
    inside = (keep >= bounds[0]) & (keep < bounds[-1]) if sequences else torch.zeros_like(keep, dtype=torch.bool)
    if valid is not None:
        inside = inside & valid
    for j in reversed(range(topk)):
        memory = indices[:, j]
        target = torch.where(inside & (memory >= 0) & (memory < num_memories), memory, memories)
        member[keep, target] = j
    if shared:
        member[:, num_memories] = torch.where(inside, topk, -1)
    member = member[:, :memories]
    selected = member >= 0

    # Position of a token inside its segment = tokens of that memory before it, less those before its sequence.
    count = torch.zeros(tokens + 1, memories, dtype=torch.int64, device=device)
    torch.cumsum(selected, 0, out=count[1:])
    sequence = torch.searchsorted(bounds[1:].contiguous(), keep, right=True).clamp(max=max(sequences - 1, 0))
    length = (count[bounds[1:]] - count[bounds[:-1]]).clamp(min=0)  # [N, M']
    chunks = (length + chunk_size - 1) // chunk_size
    end_chunk = chunks.t().reshape(-1).cumsum(0)  # memory-major
    first_chunk = (end_chunk - chunks.t().reshape(-1)).view(memories, sequences).t()
    start = first_chunk * chunk_size  # [N, M']

    slot_of = torch.full((tokens, choices + 1), -1, dtype=torch.int64, device=device)
    entry_of = torch.full((rows + 1,), -1, dtype=torch.int64, device=device)
    if tokens and sequences:
        position = count[:-1] - count[bounds[:-1]][sequence]
        slot = start[sequence] + position
        fits = selected & (position >= 0) & (position < length[sequence]) & (slot < rows)
        choice = torch.where(fits, member, choices)
        slot_of.scatter_(1, choice, torch.where(fits, slot, -1))
        entry = keep.unsqueeze(1) * choices + member
        entry_of.scatter_(0, torch.where(fits, slot, rows).reshape(-1), entry.reshape(-1))
    num_chunks = rows // chunk_size
    chunk_segment = torch.full((num_chunks,), -1, dtype=torch.int64, device=device)
    if sequences and memories and num_chunks:
        index = torch.arange(num_chunks, device=device)
        owner = torch.searchsorted(end_chunk, index, right=True)
        segment = (owner % sequences) * memories + owner // sequences
        chunk_segment = torch.where(owner < end_chunk.shape[0], segment, chunk_segment)
    group_offset = torch.zeros(memories + 1, dtype=torch.int64, device=device)
    if sequences:
        group_offset[1:] = end_chunk.view(memories, sequences)[:, -1] * chunk_size
    return (
        slot_of[:, :choices].int().contiguous(),
        entry_of[:rows].int(),
        start.reshape(-1).int(),
        length.reshape(-1).int(),
        chunk_segment.int(),
        group_offset.int(),
    )
