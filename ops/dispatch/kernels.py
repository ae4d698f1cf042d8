"""Triton kernels of the dispatch plan: counts by token block and memory, their scan, then every token's place."""

from __future__ import annotations

import triton
import triton.language as tl

FILL = tl.constexpr(1024)
"""Rows that one program of the chunk table clears."""
CHUNK_BLOCK = tl.constexpr(64)
"""Chunks that one program of the chunk table finds the segment of."""
SCAN = tl.constexpr(1024)
"""Entries of one step of a scan."""


@triton.jit
def _bound(bounds, index, tokens):
    """A sequence boundary; a wrong one is brought into range, so that no address depends on it."""
    value = tl.load(bounds + index)
    return tl.minimum(tl.maximum(value, 0), tokens).to(tl.int32)


@triton.jit
def _members(
    indices,
    valid,
    bounds,
    token,
    tokens,
    sequences,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``[BLOCK_T, BLOCK_M]``: the choice with which a token selects a memory, or -1."""
    column = tl.arange(0, BLOCK_M)
    inside = (token >= _bound(bounds, 0, tokens)) & (token < _bound(bounds, sequences, tokens)) & (token < tokens)
    if valid is not None:
        inside = inside & (tl.load(valid + token, mask=inside, other=0) != 0)
    member = tl.full([BLOCK_T, BLOCK_M], -1, tl.int32)
    for turn in range(TOPK):
        choice = TOPK - 1 - turn  # backwards: the first of repeated choices counts
        memory = tl.load(indices + token.to(tl.int64) * TOPK + choice, mask=inside, other=-1)
        hit = (memory[:, None] == column[None, :]) & (column < M)[None, :] & inside[:, None]
        member = tl.where(hit, choice, member)
    if SHARED:
        member = tl.where(inside[:, None] & (column == M)[None, :], TOPK, member)
    return member


@triton.jit
def _count_up_to(table, value, size, steps):
    """How many entries of the rising ``table[:size]`` are at most ``value``, for a block of values."""
    low = value * 0
    high = low + size
    for _ in range(steps):
        middle = (low + high) // 2
        active = low < high
        right = active & (tl.load(table + middle, mask=active, other=0) <= value)
        low = tl.where(right, middle + 1, low)
        high = tl.where(active & (right == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["tokens", "sequences", "blocks"])
def count_kernel(
    indices,
    valid,
    bounds,
    block_count,
    tokens,
    sequences,
    blocks,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Tokens of each memory in one block of tokens: ``block_count [M', blocks]``."""
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    member = _members(indices, valid, bounds, token, tokens, sequences, M, TOPK, SHARED, BLOCK_T, BLOCK_M)
    column = tl.arange(0, BLOCK_M)
    count = tl.sum((member >= 0).to(tl.int32), 0)
    tl.store(block_count + column.to(tl.int64) * blocks + block, count, mask=column < M + SHARED)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(block_count, block_offset, blocks):
    """Tokens of one memory before each block, and in all: ``block_offset [M', blocks + 1]``."""
    memory = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SCAN)
    carry = tl.zeros([], tl.int32)
    for first in range(0, blocks, SCAN):
        block = first + lane
        count = tl.load(block_count + memory * blocks + block, mask=block < blocks, other=0)
        before = carry + tl.cumsum(count, 0) - count
        tl.store(block_offset + memory * (blocks + 1) + block, before, mask=block < blocks)
        carry += tl.sum(count, 0)
    tl.store(block_offset + memory * (blocks + 1) + blocks, carry)


@triton.jit(do_not_specialize=["tokens", "sequences", "blocks"])
def bound_kernel(
    indices,
    valid,
    bounds,
    block_offset,
    bound_count,
    tokens,
    sequences,
    blocks,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Tokens of each memory before one sequence boundary: ``bound_count [N + 1, M']``."""
    index = tl.program_id(0)
    bound = _bound(bounds, index, tokens)
    block = bound // BLOCK_T
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    member = _members(indices, valid, bounds, token, tokens, sequences, M, TOPK, SHARED, BLOCK_T, BLOCK_M)
    column = tl.arange(0, BLOCK_M)
    mask = column < M + SHARED
    count = tl.sum(((member >= 0) & (token < bound)[:, None]).to(tl.int32), 0)
    count += tl.load(block_offset + column.to(tl.int64) * (blocks + 1) + block, mask=mask, other=0)
    tl.store(bound_count + index.to(tl.int64) * (M + SHARED) + column, count, mask=mask)


@triton.jit(do_not_specialize=["sequences"])
def segment_kernel(
    bound_count,
    segment_start,
    segment_length,
    end_chunk,
    group_offset,
    sequences,
    MEMORIES: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
):
    """One program places all segments, memory-major; ``end_chunk [M' N]`` is the scan of their chunks."""
    lane = tl.arange(0, SCAN)
    carry = tl.zeros([], tl.int32)
    for first in range(0, MEMORIES * sequences, SCAN):
        index = first + lane
        mask = index < MEMORIES * sequences
        memory = index // sequences
        sequence = index % sequences
        segment = sequence * MEMORIES + memory
        before = tl.load(bound_count + segment, mask=mask, other=0)
        after = tl.load(bound_count + segment + MEMORIES, mask=mask, other=0)
        length = tl.maximum(after - before, 0)
        chunks = (length + CHUNK_SIZE - 1) // CHUNK_SIZE
        end = carry + tl.cumsum(chunks, 0)
        tl.store(segment_start + segment, (end - chunks) * CHUNK_SIZE, mask=mask)
        tl.store(segment_length + segment, length, mask=mask)
        tl.store(end_chunk + index, end, mask=mask)
        tl.store(group_offset + memory + 1, end * CHUNK_SIZE, mask=mask & (sequence == sequences - 1))
        carry += tl.sum(chunks, 0)
    tl.store(group_offset, 0)


@triton.jit(do_not_specialize=["rows", "chunks", "sequences", "steps"])
def chunk_kernel(end_chunk, chunk_segment, entry_of, rows, chunks, sequences, steps, MEMORIES: tl.constexpr):
    """The segment of each chunk, and every row marked as a pad row until a token takes it."""
    program = tl.program_id(0)
    row = program.to(tl.int64) * FILL + tl.arange(0, FILL)
    tl.store(entry_of + row, tl.full([FILL], -1, tl.int32), mask=row < rows)
    chunk = program * CHUNK_BLOCK + tl.arange(0, CHUNK_BLOCK)
    owner = _count_up_to(end_chunk, chunk, MEMORIES * sequences, steps)
    segment = (owner % sequences) * MEMORIES + owner // sequences
    segment = tl.where(owner < MEMORIES * sequences, segment, -1)
    tl.store(chunk_segment + chunk, segment, mask=chunk < chunks)


@triton.jit(do_not_specialize=["tokens", "sequences", "blocks", "rows", "steps"])
def place_kernel(
    indices,
    valid,
    bounds,
    block_offset,
    bound_count,
    segment_start,
    segment_length,
    slot_of,
    entry_of,
    tokens,
    sequences,
    blocks,
    rows,
    steps,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Row of each token and choice: its segment's first row + tokens of the memory before it in its sequence."""
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    member = _members(indices, valid, bounds, token, tokens, sequences, M, TOPK, SHARED, BLOCK_T, BLOCK_M)
    column = tl.arange(0, BLOCK_M)
    selected = member >= 0
    one = selected.to(tl.int32)
    before = tl.cumsum(one, 0) - one
    before += tl.load(block_offset + column.to(tl.int64) * (blocks + 1) + block, mask=column < M + SHARED, other=0)[
        None, :
    ]

    sequence = tl.minimum(_count_up_to(bounds + 1, token, sequences, steps), sequences - 1)
    segment = sequence.to(tl.int64)[:, None] * (M + SHARED) + column[None, :]
    position = before - tl.load(bound_count + segment, mask=selected, other=0)
    slot = tl.load(segment_start + segment, mask=selected, other=0) + position
    length = tl.load(segment_length + segment, mask=selected, other=0)
    fits = selected & (position >= 0) & (position < length) & (slot < rows)
    entry = token.to(tl.int64)[:, None] * (TOPK + SHARED) + member
    tl.store(entry_of + slot, entry.to(tl.int32), mask=fits)
    for choice in range(TOPK + SHARED):
        own = tl.max(tl.where(fits & (member == choice), slot, -1), 1)
        tl.store(slot_of + token.to(tl.int64) * (TOPK + SHARED) + choice, own, mask=token < tokens)
