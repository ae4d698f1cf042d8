"""Triton kernels of the chunked forward; one chunk is 64 rows, notation as in cpu.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import INTERPRETED, helper

ROWS = tl.constexpr(64)
# exp of anything below is 0 in float32, so a stronger decay of one token needs no larger sums.
STRONGEST = tl.constexpr(-110.0)
BLOCK_S = tl.constexpr(128)


@helper
def block_of(blocks: tl.constexpr):
    """The first axis of the grid holds the blocks of one chain, or chunk, side by side: they read the same rows, which
    then are in the cache."""
    pid = tl.program_id(0)
    return pid // blocks, pid % blocks


@helper
def load_segment(chunk_segment, chunk, segments):
    """The segment of a chunk, -1 for none. The host does not check tables on a GPU, so no value may lead outside."""
    segment = tl.load(chunk_segment + chunk)
    return tl.where(segment < segments, segment, -1)


@helper
def chain_of(order, blocks: tl.constexpr, HV: tl.constexpr):
    """Segment, head and block of a program of a scan. The longest segments start first: what waits for a free
    multiprocessor is short, and their chunks, one after the other, are the time that a scan takes at least."""
    pid, block = block_of(blocks)
    return tl.load(order + pid // HV).to(tl.int64), pid % HV, block


@helper
def load_span(segment_start, segment_length, segment, rows):
    """Aligned first row and length of a segment, within the rows."""
    start = tl.minimum(tl.maximum(tl.load(segment_start + segment), 0), rows) // ROWS * ROWS
    return start, tl.minimum(tl.maximum(tl.load(segment_length + segment), 0), rows - start)


@helper
def valid_rows(segment_start, segment_length, segment, chunk):
    """Rows of the chunk that hold a token; may exceed 64."""
    return tl.load(segment_length + segment) - (chunk * ROWS - tl.load(segment_start + segment))


@helper
def load_rows(base, row, col, stride: tl.constexpr, count, width: tl.constexpr):
    """Tile ``[rows, cols]`` of a chunk, zero beyond its ``count`` rows and ``width`` columns."""
    mask = row[:, None] < count
    if width // col.shape[0] * col.shape[0] != width:
        mask = mask & (col[None, :] < width)
    return tl.load(base + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@helper
def load_rows_t(base, row, col, stride: tl.constexpr, count, width: tl.constexpr):
    """The transpose of :func:`load_rows`, ``[cols, rows]``."""
    mask = row[None, :] < count
    if width // col.shape[0] * col.shape[0] != width:
        mask = mask & (col[:, None] < width)
    return tl.load(base + row[None, :] * stride + col[:, None], mask=mask, other=0.0)


@helper
def store_rows(base, value, row, col, stride: tl.constexpr, width: tl.constexpr):
    """Pad rows are written too: their value is zero."""
    value = value.to(base.dtype.element_ty)
    if width // col.shape[0] * col.shape[0] != width:
        tl.store(base + row[:, None] * stride + col[None, :], value, mask=col[None, :] < width)
    else:
        tl.store(base + row[:, None] * stride + col[None, :], value)


@helper
def load_state(base, key, value, K: tl.constexpr, V: tl.constexpr):
    """Tile of a ``[K, V]`` state."""
    if K // key.shape[0] * key.shape[0] == K and V // value.shape[0] * value.shape[0] == V:
        return tl.load(base + key[:, None] * V + value[None, :])
    else:
        mask = (key[:, None] < K) & (value[None, :] < V)
        return tl.load(base + key[:, None] * V + value[None, :], mask=mask, other=0.0)


@helper
def load_state_t(base, key, value, K: tl.constexpr, V: tl.constexpr):
    """The transpose of :func:`load_state`."""
    if K // key.shape[0] * key.shape[0] == K and V // value.shape[0] * value.shape[0] == V:
        return tl.load(base + key[None, :] * V + value[:, None])
    else:
        mask = (key[None, :] < K) & (value[:, None] < V)
        return tl.load(base + key[None, :] * V + value[:, None], mask=mask, other=0.0)


@helper
def store_state(base, tile, key, value, K: tl.constexpr, V: tl.constexpr):
    tile = tile.to(base.dtype.element_ty)
    if K // key.shape[0] * key.shape[0] == K and V // value.shape[0] * value.shape[0] == V:
        tl.store(base + key[:, None] * V + value[None, :], tile)
    else:
        mask = (key[:, None] < K) & (value[None, :] < V)
        tl.store(base + key[:, None] * V + value[None, :], tile, mask=mask)


@helper
def load_square(base, row, col, row_stride: tl.constexpr, col_stride: tl.constexpr):
    """A ``[64, 64]`` matrix of a chunk; swapped strides give its transpose."""
    return tl.load(base + row[:, None] * row_stride + col[None, :] * col_stride)


@helper
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b``. The interpreter has no bfloat16 products. On a GPU a float32 product holds its operands in
    registers, so a sum over 64 is split over the threads."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif PRECISION == "ieee" and a.shape[1] == 64:
        a = tl.permute(tl.reshape(a, [a.shape[0], 4, 16]), [1, 0, 2])
        b = tl.reshape(b, [4, 16, b.shape[1]])
        return acc + tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@helper
def fence_copies(FENCE: tl.constexpr):
    """Before products of which both operands are pipelined loads: the proxy fence behind the wait for these loads,
    which Triton itself puts there from 3.7.1 on."""
    if FENCE:
        tl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1)


@helper
def finished(acc):
    """``acc``, once its product is done; in a loop behind a product of pipelined loads that are used besides.

    Triton keeps one buffer more for a load that asynchronous products read, since the products are still under way when
    the next copy starts; but not for a load that is read into registers as well (from 3.6.0 to 3.9.0). There the copy
    would overwrite what the product reads.
    """
    if INTERPRETED:
        return acc
    else:
        return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)


@helper
def load_key_tiles(
    base, row, col, stride: tl.constexpr, count, width: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr
):
    """The NK tiles of a chunk's keys, where they are loaded once for two products. float32 tiles would fill the
    registers: there the tuple is empty, and each product loads its own."""
    tiles = ()
    if PRECISION != "ieee":
        for b in tl.static_range(NK):
            tiles = tiles + (load_rows(base, row, col + b * col.shape[0], stride, count, width),)
    return tiles


@helper
def key_tile(
    tiles, b: tl.constexpr, base, row, col, stride: tl.constexpr, count, width: tl.constexpr, PRECISION: tl.constexpr
):
    """Tile b of :func:`load_key_tiles`."""
    if PRECISION != "ieee":
        return tiles[b]
    else:
        return load_rows(base, row, col + b * col.shape[0], stride, count, width)


@helper
def key_tile_t(
    tiles, b: tl.constexpr, base, row, col, stride: tl.constexpr, count, width: tl.constexpr, PRECISION: tl.constexpr
):
    """The transpose of :func:`key_tile`."""
    if PRECISION != "ieee":
        return tl.trans(tiles[b])
    else:
        return load_rows_t(base, row, col + b * col.shape[0], stride, count, width)


@helper
def load_square_t(base, row, col, row_stride: tl.constexpr, PRECISION: tl.constexpr):
    """The transpose of a ``[64, 64]`` matrix of a chunk."""
    if PRECISION != "ieee":
        return tl.trans(load_square(base, row, col, row_stride, 1))
    else:
        return load_square(base, row, col, 1, row_stride)


@helper
def load_gate(g, row, count, HV: tl.constexpr):
    """log decay of a chunk as (high, low) parts: sums of the high parts, multiples of 2^-10, are exact."""
    gate = tl.maximum(tl.load(g + row * HV, mask=row < count, other=0.0).to(tl.float32), STRONGEST)
    high = tl.floor(gate * 1024.0 + 0.5) * (1.0 / 1024.0)
    return high, gate - high


@helper
def pair_decay(high, low, row):
    """D, lower triangular with the diagonal. The exact high sums cancel before the low ones are added."""
    high, low = tl.cumsum(high, 0), tl.cumsum(low, 0)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(row[:, None] >= row[None, :], difference, float("-inf")))


@helper
def near_exact_product(a, b, PRECISION: tl.constexpr):
    """``a b`` of float32 matrices. For operands of less precision the tensor cores take each as the sum of two
    bfloat16 numbers, and 2^-17 of a product is left out: float32 products of the plain units took twice as long."""
    if PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    else:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low, b_low = (a - a_high.to(tl.float32)).to(tl.bfloat16), (b - b_high.to(tl.float32)).to(tl.bfloat16)
        if PRECISION == "interpreter":
            a_high, b_high = a_high.to(tl.float32), b_high.to(tl.float32)
            a_low, b_low = a_low.to(tl.float32), b_low.to(tl.float32)
        return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@helper
def lower_corner(left, corner, right, PRECISION: tl.constexpr):
    """``[1, 0]`` block of ``[[A, 0], [C, B]]^-1``, from ``left`` = A^-1, ``corner`` = C and ``right`` = B^-1."""
    return -near_exact_product(near_exact_product(right, corner, PRECISION), left, PRECISION)


@helper
def unit_lower_inverse(lower, PRECISION: tl.constexpr):
    """``(I + lower)^-1`` for a strictly lower ``[64, 64]``: forward substitution by blocks of 1, 2, .., 32.

    Each step is ``[[a, 0], [c, b]]^-1 = [[a^-1, 0], [-b^-1 c a^-1, b^-1]]``, so that only blocks of the result are ever
    formed: powers of ``lower`` (Neumann doubling) overflow for correlated keys.
    """
    r16, r4, r2 = tl.arange(0, 16), tl.arange(0, 4), tl.arange(0, 2)
    blocks = tl.reshape(lower, [4, 16, 4, 16])
    from_block, to_block = r4[:, None, None, None], r4[None, None, :, None]
    diagonal = tl.sum(tl.where(from_block == to_block, blocks, 0.0), 2)  # [4, 16, 16]
    i, j = r16[:, None], r16[None, :]
    off = tl.where(((i // 2 == j // 2) & (i > j))[None, :, :], diagonal, 0.0)
    x = tl.where((i == j)[None, :, :], 1.0, -off)
    for level in tl.static_range(1, 4):
        below = (i // (2 << level) == j // (2 << level)) & (i // (1 << level) > j // (1 << level))
        off = tl.where(below[None, :, :], diagonal, 0.0)
        x += lower_corner(x, off, x, PRECISION)

    # Blocks of 32: pairs of neighbours of 16, [2, 16, 16].
    second = (r2 == 1)[None, :, None, None]
    x = tl.reshape(x, [2, 2, 16, 16])
    left, right = tl.sum(tl.where(second, 0.0, x), 1), tl.sum(tl.where(second, x, 0.0), 1)
    corner = tl.reshape(tl.sum(tl.where(from_block == to_block + 1, blocks, 0.0), 2), [2, 2, 16, 16])
    corner = lower_corner(left, tl.sum(tl.where(second, corner, 0.0), 1), right, PRECISION)
    row, col = r2[None, :, None, None, None], r2[None, None, None, :, None]
    same = tl.where(row == 0, left[:, None, :, None, :], right[:, None, :, None, :])
    x = tl.where(row == col, same, tl.where(row > col, corner[:, None, :, None, :], 0.0))
    x = tl.reshape(x, [2, 32, 32])

    second = (r2 == 1)[:, None, None]
    left, right = tl.sum(tl.where(second, 0.0, x), 0), tl.sum(tl.where(second, x, 0.0), 0)
    row, col = r2[:, None, None, None], r2[None, None, :, None]
    corner = tl.sum(tl.sum(tl.where(row > col, tl.reshape(lower, [2, 32, 2, 32]), 0.0), 2), 0)
    corner = lower_corner(left, corner, right, PRECISION)
    x = tl.where(row == col, x[:, :, None, :], tl.where(row > col, corner[None, :, None, :], 0.0))
    return tl.reshape(x, [64, 64])


@triton.jit(do_not_specialize=["segments", "chunks"])
def scan_tables_kernel(
    g, beta, segment_start, segment_length, chunk_segment, segments, chunks, gates, order,
    HV: tl.constexpr, BLOCK_H: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """What the scans only load: exp(G), exp(G_C - G) and beta of one chunk, ``gates [chunks, HV, 3, 64]``, and the
    segments from the longest to the shortest, ``order [segments]``."""
    for segment in range(tl.program_id(0), segments, tl.num_programs(0)):
        own = tl.load(segment_length + segment)
        before = tl.full([BLOCK_S], 0, dtype=tl.int32)
        for start in range(0, segments, BLOCK_S):
            other = start + tl.arange(0, BLOCK_S)
            length = tl.load(segment_length + other, mask=other < segments, other=0)
            sooner = (length > own) | ((length == own) & (other < segment))
            before += tl.where((other < segments) & sooner, 1, 0)
        tl.store(order + tl.sum(before, 0), segment)
    if HAS_GATE or HAS_DELTA:
        chunk = tl.program_id(0).to(tl.int64)
        owner = tl.load(chunk_segment + chunk, mask=chunk < chunks, other=-1)
        if (owner >= 0) & (owner < segments):
            count = valid_rows(segment_start, segment_length, owner, chunk)
            row, head = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_H)[None, :]
            mask = (row < count) & (head < HV)
            source = (chunk * ROWS + row) * HV + head
            target = gates + (chunk * HV + head) * (3 * ROWS) + row
            if HAS_GATE:
                gate = tl.maximum(tl.load(g + source, mask=mask, other=0.0).to(tl.float32), STRONGEST)
                high = tl.floor(gate * 1024.0 + 0.5) * (1.0 / 1024.0)
                low = gate - high
                high_sum, low_sum = tl.cumsum(high, 0), tl.cumsum(low, 0)
                high_last, low_last = tl.sum(high, 0)[None, :], tl.sum(low, 0)[None, :]
                tl.store(target, tl.exp(high_sum + low_sum), mask=head < HV)
                tl.store(target + ROWS, tl.exp((high_last - high_sum) + (low_last - low_sum)), mask=head < HV)
            if HAS_DELTA:
                rate = tl.load(beta + source, mask=mask, other=0.0).to(tl.float32)
                tl.store(target + 2 * ROWS, rate, mask=head < HV)


@helper
def load_gates(gates, row, inside, HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr):
    """exp(G), exp(G_C - G), exp(G_C) and beta of a chunk out of the table; 0 where the rule has none."""
    from_start, to_end, total, rate = 0.0, 0.0, 0.0, 0.0
    mask = tl.where(inside, row, -1) >= 0
    if HAS_GATE:
        from_start = tl.load(gates + row, mask=mask, other=0.0)
        to_end = tl.load(gates + ROWS + row, mask=mask, other=0.0)
        total = tl.load(gates + ROWS - 1, mask=inside, other=0.0)
    if HAS_DELTA:
        rate = tl.load(gates + 2 * ROWS + row, mask=mask, other=0.0)
    return from_start, to_end, total, rate


@triton.jit(do_not_specialize=["segments", "scale"])
def chunk_pairs_kernel(
    q, k, g, beta, segment_start, segment_length, chunk_segment, segments, inverse, scores, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A and P of one chunk and value head."""
    pid = tl.program_id(0)
    chunk, head = (pid // HV).to(tl.int64), pid % HV
    row, col = tl.arange(0, ROWS), tl.arange(0, BK)
    square = tl.arange(0, ROWS)
    first = chunk * ROWS
    square_offset = (first * HV + head) * ROWS
    segment = load_segment(chunk_segment, chunk, segments)
    if segment < 0:
        zero = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
        store_rows(scores + square_offset, zero, row, square, HV * ROWS, ROWS)
        if HAS_DELTA:
            store_rows(inverse + square_offset, zero, row, square, HV * ROWS, ROWS)
        return
    count = valid_rows(segment_start, segment_length, segment, chunk)
    source = (first * H + head // (HV // H)) * K
    qk = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
    kk = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
    for start in range(0, K, BK):
        q_tile = load_rows(q + source, row, start + col, H * K, count, K)
        k_tiles = load_key_tiles(k + source, row, start + col, H * K, count, K, 1, PRECISION)
        k_tile_t = key_tile_t(k_tiles, 0, k + source, row, start + col, H * K, count, K, PRECISION)
        fence_copies(FENCE)
        qk = product(q_tile, k_tile_t, qk, PRECISION)
        if HAS_DELTA:
            k_tile = key_tile(k_tiles, 0, k + source, row, start + col, H * K, count, K, PRECISION)
            kk = product(k_tile, k_tile_t, kk, PRECISION)
    if HAS_GATE:
        high, low = load_gate(g + first * HV + head, row, count, HV)
        decay = pair_decay(high, low, row)
        qk *= decay
        if HAS_DELTA:
            kk *= decay
    qk = tl.where(row[:, None] >= square[None, :], qk * scale, 0.0)
    store_rows(scores + square_offset, qk, row, square, HV * ROWS, ROWS)
    if HAS_DELTA:
        rate = tl.load(beta + (first + row) * HV + head, mask=row < count, other=0.0).to(tl.float32)
        kk = tl.where(row[:, None] > square[None, :], kk * rate[:, None], 0.0)
        store_rows(inverse + square_offset, unit_lower_inverse(kk, PRECISION), row, square, HV * ROWS, ROWS)


@helper
def scan_chunks(
    k, v, gates, inverse, states, v_new, q, scores, o, scale, state, start, length, head, col, value, keep,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, SHIFT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, FENCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of the state, NK tiles ``[BK, BV]``, behind ``length`` rows from ``start`` on.

    Stores the states before each chunk, v_new and o (as chunk_out_kernel, for a delta rule), where they are not None.
    Its columns of v are ``value - SHIFT``; none where ``keep`` is 0.
    """
    row, square = tl.arange(0, ROWS), tl.arange(0, ROWS)
    chunks = (length + ROWS - 1) // ROWS
    table = gates
    if HAS_GATE or HAS_DELTA:
        table = gates + ((start // ROWS).to(tl.int64) * HV + head) * (3 * ROWS)
    upcoming = load_gates(table, row, chunks > 0, HAS_GATE, HAS_DELTA)
    for step in range(0, chunks):
        chunk = (start // ROWS + step).to(tl.int64)
        # The gates of the next chunk are on their way while this one is worked on.
        from_start, to_end, total, rate = upcoming
        if HAS_GATE or HAS_DELTA:
            table += HV * 3 * ROWS
        upcoming = load_gates(table, row, step + 1 < chunks, HAS_GATE, HAS_DELTA)
        first, count = chunk * ROWS, length - step * ROWS
        source = (first * H + head // (HV // H)) * K
        target = (first * HV + head) * V
        k_tiles = load_key_tiles(k + source, row, col, H * K, count, K, NK, PRECISION)
        v_count = count
        if SHIFT > 0:
            v_count = count * keep
        v_tile = load_rows(v + target, row, value - SHIFT, HV * V, v_count, V).to(tl.float32)
        before = states
        if states is not None:
            before = states + (chunk * HV + head) * K * V
        if not HAS_DELTA:
            for b in tl.static_range(NK):
                store_state(before, state[b], b * BK + col, value, K, V)
        if HAS_DELTA:
            read = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
            out = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
            for b in tl.static_range(NK):
                # One tile after the other, so that they can share their place in shared memory.
                if states is not None:
                    store_state(before, state[b], b * BK + col, value, K, V)
                k_tile = key_tile(k_tiles, b, k + source, row, col, H * K, count, K, PRECISION)
                s_tile = state[b].to(k_tile.dtype)
                read = product(k_tile, s_tile, read, PRECISION)
                if o is not None:
                    q_tile = load_rows(q + source, row, b * BK + col, H * K, count, K)
                    out = product(q_tile, s_tile, out, PRECISION)
            if HAS_GATE:
                read *= from_start[:, None]
            v_tile = (v_tile - read) * rate[:, None]
            a_tile = load_square(inverse + (first * HV + head) * ROWS, row, square, HV * ROWS, 1)
            zero = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
            v_tile = product(a_tile, v_tile.to(a_tile.dtype), zero, PRECISION)
            if v_new is not None:
                store_rows(v_new + target, v_tile, row, value, HV * V, V)
            if o is not None:
                if HAS_GATE:
                    out *= from_start[:, None]
                p_tile = load_square(scores + (first * HV + head) * ROWS, row, square, HV * ROWS, 1)
                out = product(p_tile, v_tile.to(p_tile.dtype), out * scale, PRECISION)
                store_rows(o + target, out, row, value, HV * V, V)
            if HAS_GATE:
                # As it is kept: the backward's states come from v_new, and no later read corrects what would differ.
                v_tile = v_tile.to(v.dtype.element_ty).to(tl.float32)
        if HAS_GATE:
            v_tile *= to_end[:, None]
        fence_copies(FENCE)
        after = ()
        for b in tl.static_range(NK):
            k_tile_t = key_tile_t(k_tiles, b, k + source, row, col, H * K, count, K, PRECISION)
            tile = state[b]
            if HAS_GATE:
                tile *= total
            after = after + (product(k_tile_t, v_tile.to(k_tile_t.dtype), tile, PRECISION),)  # type: ignore[assignment]
        state = after
    return state


@triton.jit(do_not_specialize=["rows"])
def chunk_scan_kernel(
    k, v, gates, inverse, initial_state, order, segment_start, segment_length, rows, final_state, states, v_new,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state through the chunks of one segment, for one value head and block of the state: NK tiles of BK rows, BV
    columns. With the delta a block has all rows."""
    segment, head, block = chain_of(order, tl.cdiv(K, NK * BK) * tl.cdiv(V, BV), HV)
    col = block // tl.cdiv(V, BV) * (NK * BK) + tl.arange(0, BK)
    value = block % tl.cdiv(V, BV) * BV + tl.arange(0, BV)
    start, length = load_span(segment_start, segment_length, segment, rows)
    state_offset = (segment * HV + head) * K * V
    state = ()
    for b in tl.static_range(NK):
        if initial_state is None:
            tile = tl.full([BK, BV], 0.0, dtype=tl.float32)
        else:
            tile = load_state(initial_state + state_offset, b * BK + col, value, K, V).to(tl.float32)
        state = state + (tile,)  # type: ignore[assignment]
    state = scan_chunks(
        k, v, gates, inverse, states, v_new, None, None, None, 1.0, state, start, length, head, col, value, 1,
        H, HV, K, V, BK, NK, BV, 0, HAS_GATE, HAS_DELTA, FENCE, PRECISION,
    )  # fmt: skip
    for b in tl.static_range(NK):
        store_state(final_state + state_offset, state[b], b * BK + col, value, K, V)


@triton.jit(do_not_specialize=["segments", "scale"])
def chunk_out_kernel(
    q, gates, v_new, scores, states, segment_start, segment_length, chunk_segment, segments, o, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one chunk, value head and block of V."""
    pid, block = block_of(tl.cdiv(V, BV))
    chunk, head = (pid // HV).to(tl.int64), pid % HV
    row, col, square = tl.arange(0, ROWS), tl.arange(0, BK), tl.arange(0, ROWS)
    value = block * BV + tl.arange(0, BV)
    first = chunk * ROWS
    target = (first * HV + head) * V
    out = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
    segment = load_segment(chunk_segment, chunk, segments)
    if segment < 0:
        store_rows(o + target, out, row, value, HV * V, V)
        if HAS_DELTA:  # not v itself: it may be kept, and no scan came by here
            store_rows(v_new + target, out, row, value, HV * V, V)
        return
    count = valid_rows(segment_start, segment_length, segment, chunk)
    source = (first * H + head // (HV // H)) * K
    for start in range(0, K, BK):
        q_tile = load_rows(q + source, row, start + col, H * K, count, K)
        s_tile = load_state(states + (chunk * HV + head) * K * V, start + col, value, K, V)
        fence_copies(FENCE)
        out = product(q_tile, s_tile, out, PRECISION)
    if HAS_GATE:
        out *= tl.load(gates + (chunk * HV + head) * (3 * ROWS) + row)[:, None]
    p_tile = load_square(scores + (first * HV + head) * ROWS, row, square, HV * ROWS, 1)
    v_tile = load_rows(v_new + target, row, value, HV * V, count, V)
    out = product(p_tile, v_tile, out * scale, PRECISION)
    store_rows(o + target, out, row, value, HV * V, V)
