"""Triton kernels of the chunked backward; notation and derivation as in cpu.py's ``chunk_bwd``."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_fwd import (
    ROWS,
    chain_of,
    fence_copies,
    finished,
    key_tile,
    key_tile_t,
    load_gate,
    load_gates,
    load_key_tiles,
    load_rows,
    load_rows_t,
    load_segment,
    load_span,
    load_square,
    load_square_t,
    load_state,
    load_state_t,
    pair_decay,
    product,
    store_rows,
    store_state,
    valid_rows,
)


@triton.jit(do_not_specialize=["rows", "scale"])
def chunk_scan_bwd_kernel(
    q, k, gates, inverse, scores, do, dfinal_state, order, segment_start, segment_length, rows, dstates, dw,
    dinitial_state, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr,
    BV: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state back through the chunks of one segment, for one value head and block of V.

    Writes the gradient of the state after each chunk, and of w (of v without the delta).
    """
    segment, head, block = chain_of(order, tl.cdiv(V, BV), HV)
    row, col, square = tl.arange(0, ROWS), tl.arange(0, BK), tl.arange(0, ROWS)
    value = block * BV + tl.arange(0, BV)
    start, length = load_span(segment_start, segment_length, segment, rows)
    state_offset = (segment * HV + head) * K * V
    state = ()
    for b in tl.static_range(NK):
        if dfinal_state is None:
            tile = tl.full([BK, BV], 0.0, dtype=tl.float32)
        else:
            tile = load_state(dfinal_state + state_offset, b * BK + col, value, K, V).to(tl.float32)
        state = state + (tile,)  # type: ignore[assignment]
    chunks = (length + ROWS - 1) // ROWS
    table = gates
    if HAS_GATE or HAS_DELTA:
        table = gates + ((start // ROWS + chunks - 1).to(tl.int64) * HV + head) * (3 * ROWS)
    upcoming = load_gates(table, row, chunks > 0, HAS_GATE, HAS_DELTA)
    for back in range(0, chunks):
        step = chunks - 1 - back
        from_start, to_end, total, rate = upcoming
        if HAS_GATE or HAS_DELTA:
            table -= HV * 3 * ROWS
        upcoming = load_gates(table, row, back + 1 < chunks, HAS_GATE, HAS_DELTA)
        chunk = (start // ROWS + step).to(tl.int64)
        first, count = chunk * ROWS, length - step * ROWS
        source = (first * H + head // (HV // H)) * K
        target = (first * HV + head) * V
        squares = (first * HV + head) * ROWS
        k_tiles = load_key_tiles(k + source, row, col, H * K, count, K, NK, PRECISION)
        grad = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
        for b in tl.static_range(NK):
            store_state(dstates + (chunk * HV + head) * K * V, state[b], b * BK + col, value, K, V)
            k_tile = key_tile(k_tiles, b, k + source, row, col, H * K, count, K, PRECISION)
            grad = product(k_tile, state[b].to(k_tile.dtype), grad, PRECISION)
        do_tile = load_rows(do + target, row, value, HV * V, count, V)
        p_tile_t = load_square_t(scores + squares, row, square, HV * ROWS, PRECISION)
        if HAS_GATE:
            # Right behind the products with the state, whose proxy fence covers these two loads as well.
            inner = product(p_tile_t, do_tile, tl.full([ROWS, BV], 0.0, dtype=tl.float32), PRECISION)
            grad = grad * to_end[:, None] + inner
        else:
            grad = product(p_tile_t, do_tile, grad, PRECISION)
        if HAS_DELTA:
            a_tile_t = load_square_t(inverse + squares, row, square, HV * ROWS, PRECISION)
            zero = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
            grad = product(a_tile_t, grad.to(a_tile_t.dtype), zero, PRECISION)
        store_rows(dw + target, grad, row, value, HV * V, V)

        # What the chunk's reads give to the state before it: by q, and by k where the write is a delta.
        read_q = do_tile.to(tl.float32) * scale
        if HAS_GATE:
            read_q *= from_start[:, None]
        if HAS_DELTA:
            if HAS_GATE:
                rate *= from_start
            read_k = grad * -rate[:, None]
        q_tiles = load_key_tiles(q + source, row, col, H * K, count, K, NK, PRECISION)
        before = ()
        for b in tl.static_range(NK):
            tile = state[b]
            if HAS_GATE:
                tile *= total
            q_tile_t = key_tile_t(q_tiles, b, q + source, row, col, H * K, count, K, PRECISION)
            tile = product(q_tile_t, read_q.to(q_tile_t.dtype), tile, PRECISION)
            if HAS_DELTA:
                k_tile_t = key_tile_t(k_tiles, b, k + source, row, col, H * K, count, K, PRECISION)
                tile = product(k_tile_t, read_k.to(k_tile_t.dtype), tile, PRECISION)
            before = before + (tile,)  # type: ignore[assignment]
        state = before
    if dinitial_state is not None:
        for b in tl.static_range(NK):
            store_state(dinitial_state + state_offset, state[b], b * BK + col, value, K, V)


@triton.jit(do_not_specialize=["segments", "scale"])
def chunk_pairs_bwd_kernel(
    k, v, g, beta, scores, v_new, do, dw, segment_start, segment_length, chunk_segment, segments, dqk, dkk,
    dv, dgate, dbeta, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, STAGES: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The 64x64 gradients of one chunk and value head: of q k^T and of k k^T (made symmetric), and what they give to
    the cumulative decay and to beta. Also dv where the write is a delta."""
    pid = tl.program_id(0)
    chunk, head = (pid // HV).to(tl.int64), pid % HV
    row, square = tl.arange(0, ROWS), tl.arange(0, ROWS)
    col, value = tl.arange(0, BK), tl.arange(0, BV)
    first = chunk * ROWS
    target = (first * HV + head) * V
    squares = (first * HV + head) * ROWS
    segment = load_segment(chunk_segment, chunk, segments)
    if segment < 0:
        for start in range(0, V, BV):
            zero = tl.full([ROWS, BV], 0.0, dtype=tl.float32)
            store_rows(dv + target, zero, row, start + value, HV * V, V)
        return
    count = valid_rows(segment_start, segment_length, segment, chunk)
    source = (first * H + head // (HV // H)) * K
    lower, strict = row[:, None] >= square[None, :], row[:, None] > square[None, :]
    if HAS_GATE:
        high, low = load_gate(g + first * HV + head, row, count, HV)
        decay = pair_decay(high, low, row)

    # One pair of 64x64 products after the other: all four at once do not fit the registers.
    dp = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
    for start in range(0, V, BV):
        do_tile = load_rows(do + target, row, start + value, HV * V, count, V)
        new_tile_t = load_rows_t(v_new + target, row, start + value, HV * V, count, V)
        fence_copies(FENCE)
        dp = product(do_tile, new_tile_t, dp, PRECISION)
    dp = tl.where(lower, dp, 0.0)
    if HAS_GATE:
        pairs = dp * load_square(scores + squares, row, square, HV * ROWS, 1).to(tl.float32)
        cumulative = tl.sum(pairs, 1) - tl.sum(pairs, 0)
        dp *= decay
    store_rows(dqk + squares, dp * scale, row, square, HV * ROWS, ROWS)

    if HAS_DELTA:
        rate = tl.load(beta + (first + row) * HV + head, mask=row < count, other=0.0).to(tl.float32)
        along_v = tl.full([ROWS], 0.0, dtype=tl.float32)
        r = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
        for start in tl.range(0, V, BV, num_stages=STAGES):
            dw_tile = load_rows(dw + target, row, start + value, HV * V, count, V)
            new_tile_t = load_rows_t(v_new + target, row, start + value, HV * V, count, V)
            v_tile = load_rows(v + target, row, start + value, HV * V, count, V).to(tl.float32)
            fence_copies(FENCE)
            r = finished(product(dw_tile, new_tile_t, r, PRECISION))
            along_v += tl.sum(dw_tile.to(tl.float32) * v_tile, 1)
            store_rows(dv + target, dw_tile.to(tl.float32) * rate[:, None], row, start + value, HV * V, V)
        r = tl.where(strict, r, 0.0)
        kk = tl.full([ROWS, ROWS], 0.0, dtype=tl.float32)
        for start in range(0, K, BK):
            k_tiles = load_key_tiles(k + source, row, start + col, H * K, count, K, 1, PRECISION)
            k_tile = key_tile(k_tiles, 0, k + source, row, start + col, H * K, count, K, PRECISION)
            k_tile_t = key_tile_t(k_tiles, 0, k + source, row, start + col, H * K, count, K, PRECISION)
            fence_copies(FENCE)
            kk = product(k_tile, k_tile_t, kk, PRECISION)
        if HAS_GATE:
            kk *= decay
        kk *= r
        # R . L / beta summed over a row is <dw_i, sum_j L_ij / beta_i v_new_j>.
        tl.store(dbeta + (first + row) * HV + head, along_v - tl.sum(kk, 1))
        r *= -rate[:, None]
        if HAS_GATE:
            kk *= -rate[:, None]
            cumulative += tl.sum(kk, 1) - tl.sum(kk, 0)
            r *= decay
        store_rows(dkk + squares, r + tl.trans(r), row, square, HV * ROWS, ROWS)
    if HAS_GATE:
        tl.store(dgate + (first + row) * HV + head, cumulative)


@triton.jit(do_not_specialize=["segments", "scale"])
def chunk_bwd_kernel(
    q, k, gates, v_new, do, dw, states, dstates, dqk, dkk, gate_part, beta_part, segment_start, segment_length,
    chunk_segment, segments, dq, dk, dg, dbeta, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr, FENCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk (one per value head), dg and dbeta of one chunk and value head."""
    pid = tl.program_id(0)
    chunk, head = (pid // HV).to(tl.int64), pid % HV
    row, square = tl.arange(0, ROWS), tl.arange(0, ROWS)
    col, value = tl.arange(0, BK), tl.arange(0, BV)
    first = chunk * ROWS
    per_head = (first + row) * HV + head
    result = (first * HV + head) * K
    segment = load_segment(chunk_segment, chunk, segments)
    if segment < 0:
        for start in range(0, K, BK):
            zero = tl.full([ROWS, BK], 0.0, dtype=tl.float32)
            store_rows(dq + result, zero, row, start + col, HV * K, K)
            store_rows(dk + result, zero, row, start + col, HV * K, K)
        if HAS_GATE:
            tl.store(dg + per_head, tl.full([ROWS], 0.0, dtype=dg.dtype.element_ty))
        if HAS_DELTA:
            tl.store(dbeta + per_head, tl.full([ROWS], 0.0, dtype=dbeta.dtype.element_ty))
        return
    count = valid_rows(segment_start, segment_length, segment, chunk)
    source = (first * H + head // (HV // H)) * K
    target = (first * HV + head) * V
    squares = (first * HV + head) * ROWS
    state_offset = (chunk * HV + head) * K * V
    table = gates
    if HAS_GATE or HAS_DELTA:
        table = gates + (chunk * HV + head) * (3 * ROWS)
    from_start, to_end, total, rate = load_gates(table, row, segment >= 0, HAS_GATE, HAS_DELTA)
    read_q = tl.full([ROWS], 0.0, dtype=tl.float32)  # <q_i, dq_i> of the read of the state
    read_k = tl.full([ROWS], 0.0, dtype=tl.float32)  # <dw_i, what k_i read from the state>
    write = tl.full([ROWS], 0.0, dtype=tl.float32)
    carried = tl.full([BV // 8, BK], 0.0, dtype=tl.float32)  # <S0, dS1>
    dqk_tile = load_square(dqk + squares, row, square, HV * ROWS, 1)
    dqk_tile_t = load_square_t(dqk + squares, row, square, HV * ROWS, PRECISION)
    if HAS_DELTA:
        dkk_tile = load_square(dkk + squares, row, square, HV * ROWS, 1)
    for start in range(0, K, BK):
        # Before the products over V: behind them, Triton would move what it sums to the layout of these loads.
        q_tile = load_rows(q + source, row, start + col, H * K, count, K)
        k_tile = load_rows(k + source, row, start + col, H * K, count, K)
        # dq before dk, not in one loop over V: the sums of both do not fit the registers.
        dq_tile = tl.full([ROWS, BK], 0.0, dtype=tl.float32)
        for at in range(0, V, BV):
            s_tile_t = load_state_t(states + state_offset, start + col, at + value, K, V)
            do_tile = load_rows(do + target, row, at + value, HV * V, count, V)
            fence_copies(FENCE)
            dq_tile = product(do_tile, s_tile_t, dq_tile, PRECISION)
        dq_tile *= scale
        if HAS_GATE:
            dq_tile *= from_start[:, None]
            read_q += tl.sum(q_tile.to(tl.float32) * dq_tile, 1)
        dq_tile = product(dqk_tile, k_tile, dq_tile, PRECISION)
        store_rows(dq + result, dq_tile, row, start + col, HV * K, K)

        dk_tile = tl.full([ROWS, BK], 0.0, dtype=tl.float32)
        dk_read = tl.full([ROWS, BK], 0.0, dtype=tl.float32)
        for at in range(0, V, BV):
            ds_tile_t = load_state_t(dstates + state_offset, start + col, at + value, K, V)
            new_tile = load_rows(v_new + target, row, at + value, HV * V, count, V)
            if HAS_DELTA or HAS_GATE:
                s_tile_t = load_state_t(states + state_offset, start + col, at + value, K, V)
            if HAS_DELTA:
                dw_tile = load_rows(dw + target, row, at + value, HV * V, count, V)
            fence_copies(FENCE)
            dk_tile = product(new_tile, ds_tile_t, dk_tile, PRECISION)
            if HAS_DELTA:
                dk_read = product(dw_tile, s_tile_t, dk_read, PRECISION)
            if HAS_GATE and HAS_DELTA:
                dk_read = finished(dk_read)
            elif HAS_GATE:
                dk_tile = finished(dk_tile)
            if HAS_GATE:
                # Summed over what one thread has loaded: a sum over a whole axis is a barrier in each step.
                both = s_tile_t.to(tl.float32) * ds_tile_t.to(tl.float32)
                carried += tl.sum(tl.reshape(both, [BV // 8, 8, BK]), 1)
        if HAS_GATE:
            dk_tile *= to_end[:, None]
            write += tl.sum(k_tile.to(tl.float32) * dk_tile, 1)
        if HAS_DELTA:
            if HAS_GATE:
                dk_read *= from_start[:, None]
            read_k += tl.sum(k_tile.to(tl.float32) * dk_read, 1)
            dk_tile -= dk_read * rate[:, None]
            dk_tile = product(dkk_tile, k_tile, dk_tile, PRECISION)
        dk_tile = product(dqk_tile_t, q_tile, dk_tile, PRECISION)
        store_rows(dk + result, dk_tile, row, start + col, HV * K, K)
    if HAS_DELTA:
        tl.store(dbeta + per_head, (tl.load(beta_part + per_head) - read_k).to(dbeta.dtype.element_ty))
    if HAS_GATE:
        cumulative = tl.load(gate_part + per_head) + read_q - write
        if HAS_DELTA:
            cumulative -= rate * read_k
        # g_j is part of every G_i with i >= j, and of G_C.
        later = tl.sum(tl.where(row[:, None] >= square[None, :], cumulative[:, None], 0.0), 0)
        later += tl.sum(tl.sum(carried, 1), 0) * total + tl.sum(write, 0)
        tl.store(dg + per_head, tl.where(row < count, later, 0.0).to(dg.dtype.element_ty))
