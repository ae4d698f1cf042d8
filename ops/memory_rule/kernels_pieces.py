"""Triton kernels of the scan in pieces: one long segment's chunks, PIECE of them a piece, side by side.

A piece turns the state S before it into ``T S + L``: *transition* gives T and L of each piece, as the state of K more
columns that begins with the identity and reads no values; *join* takes them one after the other and gives the state
before each piece; *piece* is the scan of one, with o. Only delta rules; without one there is no product with the state
to wait for. What goes from one to the other is float32 as the sum of two bfloat16 numbers, `[2, rows, columns]`: the
join multiplies it as it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import helper
from .kernels_fwd import (
    BLOCK_S,
    ROWS,
    block_of,
    fence_copies,
    load_span,
    load_state,
    product,
    scan_chunks,
    store_rows,
    store_state,
)


@helper
def count_pieces(segment_length, segments, PIECE: tl.constexpr):
    """Chunks and pieces of up to BLOCK_S segments, and the pieces of them and those before."""
    number = tl.arange(0, BLOCK_S)
    length = tl.load(segment_length + number, mask=number < segments, other=0)
    chunks = (tl.maximum(length, 0) + ROWS - 1) // ROWS
    pieces = (chunks + PIECE - 1) // PIECE
    return number, chunks, pieces, tl.cumsum(pieces, 0)


@helper
def load_piece(segment_start, segment_length, segments, rows, piece, PIECE: tl.constexpr):
    """Segment, first row and length of a piece, and whether it is its segment's first and last; 0 rows behind the last
    of all."""
    number, chunks, pieces, end = count_pieces(segment_length, segments, PIECE)
    segment = tl.sum((end <= piece).to(tl.int32), 0)
    own = number == segment
    first = (piece - tl.sum(tl.where(own, end - pieces, 0), 0)) * PIECE
    last = first + PIECE >= tl.sum(tl.where(own, chunks, 0), 0)
    exists = segment < segments
    segment = tl.where(exists, segment, 0).to(tl.int64)
    start, length = load_span(segment_start, segment_length, segment, rows)
    length = tl.minimum(length - first * ROWS, PIECE * ROWS)
    return segment, start + first * ROWS, tl.where(exists, length, 0), first == 0, last


@helper
def load_parts(base, key, value, K: tl.constexpr, V: tl.constexpr):
    """A tile of the sum of two matrices."""
    high, low = load_state(base, key, value, K, V), load_state(base + K * V, key, value, K, V)
    return high.to(tl.float32) + low.to(tl.float32)


@helper
def store_parts(base, tile, key, value, K: tl.constexpr, V: tl.constexpr):
    """As :func:`load_parts` gives it back, but for 2^-17 of it."""
    high = tile.to(tl.bfloat16)
    store_state(base, high, key, value, K, V)
    store_state(base + K * V, tile - high.to(tl.float32), key, value, K, V)


@helper
def clear_unused(
    o, chunk_segment, chunks, segments, piece, head, value, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Zeros in a block of o where no segment has a chunk: of the PIECE ones, counted from the first of all."""
    number = tl.arange(0, BLOCK_S)
    chunk = piece * PIECE + number
    segment = tl.load(chunk_segment + chunk, mask=(number < PIECE) & (chunk < chunks), other=0)
    unused = (segment < 0) | (segment >= segments)
    zero = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
    for _ in range(0, tl.sum(unused.to(tl.int32), 0)):
        first = tl.min(tl.where(unused, chunk, chunks), 0)
        target = o + (first.to(tl.int64) * ROWS * HV + head) * V
        store_rows(target, zero, tl.arange(0, ROWS), value, HV * V, V)
        unused = unused & (chunk > first)


@triton.jit(do_not_specialize=["segments", "rows"])
def chunk_transition_kernel(
    k, v, gates, inverse, initial_state, segment_start, segment_length, segments, rows, transitions,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, PIECE: tl.constexpr, HAS_GATE: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and L, side by side, of one piece that is not a segment's last, value head and block of columns:
    ``transitions [pieces, HV, 2, K, K + V]``. Of a segment's first there is no T, and L is the state behind it."""
    pid, block = block_of((K + V) // BV)
    piece, head = pid // HV, pid % HV
    segment, start, length, begins, last = load_piece(segment_start, segment_length, segments, rows, piece, PIECE)
    identity = block * BV < K
    if last | (length <= 0) | (begins & identity):
        return
    col, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = ()
    for b in tl.static_range(NK):
        key = b * BK + col
        tile = tl.where(key[:, None] == value[None, :], 1.0, 0.0)
        if initial_state is not None:
            source = initial_state + (segment * HV + head) * K * V + key[:, None] * V + (value - K)[None, :]
            inside = (key[:, None] < tl.where(begins, K, 0)) & (value[None, :] >= K)
            tile += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        state = state + (tile,)  # type: ignore[assignment]
    keep = 1 - identity.to(tl.int32)
    state = scan_chunks(
        k, v, gates, inverse, None, None, None, None, None, 1.0, state, start, length, head, col, value, keep,
        H, HV, K, V, BK, NK, BV, K, HAS_GATE, True, FENCE, PRECISION,
    )  # fmt: skip
    result = transitions + (piece.to(tl.int64) * HV + head) * 2 * K * (K + V)
    for b in tl.static_range(NK):
        store_parts(result, state[b], b * BK + col, value, K, K + V)


@triton.jit(do_not_specialize=["segments"])
def chunk_join_kernel(
    transitions, initial_state, segment_length, segments, starts, final_state,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PIECE: tl.constexpr,
    FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each piece of a segment, for one value head and BV columns: ``starts [pieces, HV, 2, K, V]``. A
    segment without rows keeps its state."""
    pid, block = block_of(V // BV)
    segment, head = (pid // HV).to(tl.int64), pid % HV
    key, col, value = tl.arange(0, K), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    number, chunks, pieces, end = count_pieces(segment_length, segments, PIECE)
    count = tl.sum(tl.where(number == segment, pieces, 0), 0)
    piece = tl.sum(tl.where(number == segment, end - pieces, 0), 0).to(tl.int64)
    offset = (segment * HV + head) * K * V
    state = tl.full([K, BV], 0.0, dtype=tl.float32)
    if initial_state is not None:
        state = load_state(initial_state + offset, key, value, K, V).to(tl.float32)
    if count == 0:
        store_state(final_state + offset, state, key, value, K, V)
    else:
        store_parts(starts + (piece * HV + head) * 2 * K * V, state, key, value, K, V)
    for step in range(1, count):
        transition = transitions + (piece * HV + head) * 2 * K * (K + V)
        before = starts + (piece * HV + head) * 2 * K * V
        # On their way while the product is formed.
        high = load_state(transition, key, K + value, K, K + V)
        low = load_state(transition + K * (K + V), key, K + value, K, K + V)
        state = tl.full([K, BV], 0.0, dtype=tl.float32)
        # Each thread wrote rows of all; the product reads them.
        tl.debug_barrier()
        for start in range(0, tl.where(step > 1, K, 0), BK):
            t_high = load_state(transition, key, start + col, K, K + V)
            t_low = load_state(transition + K * (K + V), key, start + col, K, K + V)
            s_high = load_state(before, start + col, value, K, V)
            s_low = load_state(before + K * V, start + col, value, K, V)
            fence_copies(FENCE)
            state = product(t_low, s_high, state, PRECISION)
            state = product(t_high, s_low, state, PRECISION)
            state = product(t_high, s_high, state, PRECISION)
        state += high.to(tl.float32) + low.to(tl.float32)
        piece += 1
        store_parts(starts + (piece * HV + head) * 2 * K * V, state, key, value, K, V)


@triton.jit(do_not_specialize=["segments", "rows", "chunks", "scale"])
def chunk_piece_kernel(
    q, k, v, gates, inverse, scores, segment_start, segment_length, chunk_segment, segments, rows, chunks, starts,
    final_state, o, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, PIECE: tl.constexpr, HAS_GATE: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one piece, from the state before it, and the segment's final state."""
    pid, block = block_of(V // BV)
    piece, head = pid // HV, pid % HV
    col, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    clear_unused(o, chunk_segment, chunks, segments, piece, head, value, HV, V, BV, PIECE)
    segment, start, length, _, last = load_piece(segment_start, segment_length, segments, rows, piece, PIECE)
    if length <= 0:
        return
    state = ()
    for b in tl.static_range(NK):
        tile = load_parts(starts + (piece.to(tl.int64) * HV + head) * 2 * K * V, b * BK + col, value, K, V)
        state = state + (tile,)  # type: ignore[assignment]
    state = scan_chunks(
        k, v, gates, inverse, None, None, q, scores, o, scale, state, start, length, head, col, value, 1,
        H, HV, K, V, BK, NK, BV, 0, HAS_GATE, True, FENCE, PRECISION,
    )  # fmt: skip
    if last:
        for b in tl.static_range(NK):
            store_state(final_state + (segment * HV + head) * K * V, state[b], b * BK + col, value, K, V)
