"""Triton kernels of the scan in pieces: one long segment's chunks, PIECE of them a piece, side by side.

A piece turns the state S before it into ``T S + L``: *transition* gives T and L of each piece, as the state of K more
columns that begins with the identity and reads no values; *join* takes them one after the other and gives the state
before each piece; *piece* is the scan of one. Only delta rules; without one there is no product with the state to wait
for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import helper
from .kernels_fwd import (
    BLOCK_S,
    ROWS,
    block_of,
    load_span,
    load_state,
    near_exact_product,
    scan_chunks,
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
    """Segment, first row and length of a piece, and whether it is its segment's last; 0 rows behind the last of all."""
    number, chunks, pieces, end = count_pieces(segment_length, segments, PIECE)
    segment = tl.sum((end <= piece).to(tl.int32), 0)
    own = number == segment
    first = (piece - tl.sum(tl.where(own, end - pieces, 0), 0)) * PIECE
    last = first + PIECE >= tl.sum(tl.where(own, chunks, 0), 0)
    exists = segment < segments
    segment = tl.where(exists, segment, 0).to(tl.int64)
    start, length = load_span(segment_start, segment_length, segment, rows)
    length = tl.minimum(length - first * ROWS, PIECE * ROWS)
    return segment, start + first * ROWS, tl.where(exists, length, 0), last


@triton.jit(do_not_specialize=["segments", "rows"])
def chunk_transition_kernel(
    k, v, gates, inverse, segment_start, segment_length, segments, rows, transitions,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, PIECE: tl.constexpr, HAS_GATE: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and L, side by side, of one piece that is not a segment's last, value head and block of columns:
    ``transitions [pieces, HV, K, K + V]``."""
    pid, block = block_of((K + V) // BV)
    piece, head = pid // HV, pid % HV
    segment, start, length, last = load_piece(segment_start, segment_length, segments, rows, piece, PIECE)
    if last | (length <= 0):
        return
    col, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = ()
    for b in tl.static_range(NK):
        same = (b * BK + col)[:, None] == value[None, :]
        state = state + (tl.where(same, 1.0, 0.0),)  # type: ignore[assignment]
    keep = (block * BV >= K).to(tl.int32)
    state = scan_chunks(
        k, v, gates, inverse, None, None, state, start, length, head, col, value, keep,
        H, HV, K, V, BK, NK, BV, K, HAS_GATE, True, FENCE, PRECISION,
    )  # fmt: skip
    result = transitions + (piece.to(tl.int64) * HV + head) * K * (K + V)
    for b in tl.static_range(NK):
        store_state(result, state[b], b * BK + col, value, K, K + V)


@triton.jit(do_not_specialize=["segments"])
def chunk_join_kernel(
    transitions, initial_state, segment_length, segments, starts, final_state,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each piece of a segment, for one value head and BV columns: ``starts [pieces, HV, K, V]``. A
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
        store_state(starts + (piece * HV + head) * K * V, state, key, value, K, V)
    for _ in range(1, count):
        transition = transitions + (piece * HV + head) * K * (K + V)
        target = starts + ((piece + 1) * HV + head) * K * V
        for start in range(0, K, BK):
            part = load_state(transition, start + col, K + value, K, K + V)
            part += near_exact_product(load_state(transition, start + col, key, K, K + V), state, PRECISION)
            store_state(target, part, start + col, value, K, V)
        # Each thread wrote rows of all; the next piece's product reads them.
        tl.debug_barrier()
        state = load_state(target, key, value, K, V)
        piece += 1


@triton.jit(do_not_specialize=["segments", "rows"])
def chunk_piece_kernel(
    k, v, gates, inverse, segment_start, segment_length, segments, rows, starts, final_state, states, v_new,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, PIECE: tl.constexpr, HAS_GATE: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As chunk_scan_kernel for one piece, from the state before it."""
    pid, block = block_of(V // BV)
    piece, head = pid // HV, pid % HV
    segment, start, length, last = load_piece(segment_start, segment_length, segments, rows, piece, PIECE)
    if length <= 0:
        return
    col, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = ()
    for b in tl.static_range(NK):
        tile = load_state(starts + (piece.to(tl.int64) * HV + head) * K * V, b * BK + col, value, K, V)
        state = state + (tile,)  # type: ignore[assignment]
    state = scan_chunks(
        k, v, gates, inverse, states, v_new, state, start, length, head, col, value, 1,
        H, HV, K, V, BK, NK, BV, 0, HAS_GATE, True, FENCE, PRECISION,
    )  # fmt: skip
    if last:
        for b in tl.static_range(NK):
            store_state(final_state + (segment * HV + head) * K * V, state[b], b * BK + col, value, K, V)
