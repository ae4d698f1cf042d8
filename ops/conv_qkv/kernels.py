"""Triton kernels that turn projections into q, k and v rows: convolution, SiLU, and the L2 norm of q and k.

A program takes one chunk and some heads of one of the three parts, and walks down the rows with the last W-1 inputs
(and gradients) in registers: every element is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import helper, sigmoid

EPS = tl.constexpr(1e-6)


@helper
def _where(condition, valid):
    """``valid`` under a scalar condition; the interpreter makes integers of a scalar that a tile is masked with."""
    return tl.where(condition, valid, False)


@helper
def _columns(
    block, PART: tl.constexpr, H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles ``[BLOCK_H, BLOCK_K]``: columns within the part, which of them exist, and their channels."""
    head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    lane = tl.arange(0, BLOCK_K)[None, :]
    if PART == 2:
        column = head * BLOCK_K + lane
        return column, column < VS, 2 * H * K + column
    else:
        column = head * K + lane
        return column, (head < H) & (lane < K), PART * H * K + column


@helper
def _extent(start, length, rows):
    """Length of a segment, none where its rows are not all there: no address depends on a wrong table."""
    return tl.where((start >= 0) & (length <= rows - start), length, 0)


@helper
def _input(
    x, entry_of, start, position, length, tokens, column, valid,
    STRIDE: tl.constexpr, CHOICES: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """The input at a position of the segment, 0 outside; where GATHER, out of the row's token."""
    row = start + position
    inside = (position >= 0) & (position < length)
    if GATHER:
        entry = tl.load(entry_of + row, mask=inside, other=-1)
        row = entry // CHOICES
        inside = (entry >= 0) & (row < tokens)
    return tl.load(x + row.to(tl.int64) * STRIDE + column, mask=_where(inside, valid), other=0.0).to(tl.float32)


@helper
def _history(
    x, entry_of, state, segment, start, position, length, tokens, column, valid, channel,
    F: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, CHOICES: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """As ``_input``; positions below 0 come out of the state before the segment."""
    value = _input(x, entry_of, start, position, length, tokens, column, valid, STRIDE, CHOICES, GATHER)
    if state is not None:
        old = WIDTH - 1 + position
        address = state + (segment.to(tl.int64) * F + channel) * (WIDTH - 1) + old
        value += tl.load(address, mask=_where((position < 0) & (old >= 0), valid), other=0.0).to(tl.float32)
    return value


@helper
def _taps(weight, channel, valid, WIDTH: tl.constexpr):
    taps = ()
    for tap in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + channel * WIDTH + tap, mask=valid, other=0.0).to(tl.float32),)
    return taps


@helper
def _grad_linear(linear, dy, NORM: tl.constexpr):
    """The gradient before SiLU and norm, from the one behind them."""
    share = sigmoid(linear)
    y = linear * share
    slope = share + y * (1.0 - share)
    if NORM:
        square, along = tl.split(tl.sum(tl.join(y * y, dy * y), 1))  # one barrier for both
        rstd = tl.rsqrt(square + EPS)
        along *= rstd * rstd * rstd
        dy = dy * rstd[:, None] - y * along[:, None]
    return dy * slope


@helper
def _segment(segment_start, segment_length, chunk_segment, chunk, segments, rows):
    """Segment of a chunk, its first row and length (0 where the chunk is unused)."""
    segment = tl.load(chunk_segment + chunk)
    used = (segment >= 0) & (segment < segments)
    segment = tl.where(used, segment, 0)
    start = tl.load(segment_start + segment, mask=used, other=0)
    length = tl.load(segment_length + segment, mask=used, other=0)
    return segment, start, _extent(start, length, rows)


@helper
def _forward(
    x, y, weight, state, entry_of, segment, start, length, chunk, tokens, block,
    PART: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    GATHER: tl.constexpr = PART == 0
    target, valid, channel = _columns(block, PART, H, K, VS, BLOCK_H, BLOCK_K)
    column = target + OFFSET
    first = chunk * CHUNK - start
    taps = _taps(weight, channel, valid, WIDTH)
    window = ()
    for back in tl.static_range(WIDTH - 1):
        value = _history(
            x, entry_of, state, segment, start, first - (WIDTH - 1) + back, length, tokens, column, valid,
            channel, F, WIDTH, STRIDE, CHOICES, GATHER,
        )  # fmt: skip
        window = window + (value,)
    count = tl.minimum(tl.maximum(length - first, 0), CHUNK)
    for group in range(0, count, UNROLL):
        values = window
        for u in tl.static_range(UNROLL):
            value = _input(
                x, entry_of, start, first + group + u, length, tokens, column, valid, STRIDE, CHOICES, GATHER
            )
            values = values + (value,)
        for u in tl.static_range(UNROLL):
            result = values[u] * taps[0]
            for tap in tl.static_range(1, WIDTH):
                result += values[u + tap] * taps[tap]
            result *= sigmoid(result)
            if PART != 2:
                result *= tl.rsqrt(tl.sum(result * result, 1) + EPS)[:, None]
            address = y + (chunk.to(tl.int64) * CHUNK + group + u) * OUT + target
            tl.store(address, result.to(y.dtype.element_ty), mask=_where(group + u < count, valid))
        window = ()
        for back in tl.static_range(WIDTH - 1):
            window = window + (values[UNROLL + back],)
    zero = tl.zeros([BLOCK_H, BLOCK_K], y.dtype.element_ty)
    for row in range(count, CHUNK):
        tl.store(y + (chunk.to(tl.int64) * CHUNK + row) * OUT + target, zero, mask=valid)


@triton.jit(do_not_specialize=["rows", "tokens", "segments"])
def conv_qkv_kernel(
    q, kv, weight, state, entry_of, segment_start, segment_length, chunk_segment, q_out, k_out, v_out, rows, tokens,
    segments,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q, k and v rows of one chunk, some heads of one of them."""
    KEY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (VS + BLOCK_H * BLOCK_K - 1) // (BLOCK_H * BLOCK_K)
    F: tl.constexpr = 2 * H * K + VS
    chunk, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    segment, start, length = _segment(segment_start, segment_length, chunk_segment, chunk, segments, rows)
    if block < KEY_BLOCKS:
        _forward(
            q, q_out, weight, state, entry_of, segment, start, length, chunk, tokens, block,
            0, H * K, 0, H * K, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    elif block < 2 * KEY_BLOCKS:
        _forward(
            kv, k_out, weight, state, entry_of, segment, start, length, chunk, tokens, block - KEY_BLOCKS,
            1, H * K + VS, 0, H * K, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        _forward(
            kv, v_out, weight, state, entry_of, segment, start, length, chunk, tokens, block - 2 * KEY_BLOCKS,
            2, H * K + VS, H * K, VS, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H, BLOCK_K,
        )  # fmt: skip


@helper
def _backward_rows(
    dy, dfinal, x, entry_of, dx, window, grads, shares, taps, segment, start, length, chunk, row, count, tokens,
    part_column, column, valid, channel,
    NORM: tl.constexpr, GATHER: tl.constexpr, STRIDE: tl.constexpr, OUT: tl.constexpr, F: tl.constexpr,
    WIDTH: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the taps from ROWS rows, and of the inputs of the rows W-1 before them. Gives the inputs and
    gradients that the next rows need, and the sums of the taps. LAST: rows may lie behind those of the chunk."""
    first = chunk * CHUNK - start
    incoming = ()
    for u in tl.static_range(ROWS):
        position = first + row + u
        value = _input(x, entry_of, start, position, length, tokens, column, valid, STRIDE, CHOICES, GATHER)
        window = window + (value,)
        value = _input(dy, entry_of, start, position, length, tokens, part_column, valid, OUT, 1, False)
        incoming = incoming + (value,)
    for u in tl.static_range(ROWS):
        linear = window[u] * taps[0]
        for tap in tl.static_range(1, WIDTH):
            linear += window[u + tap] * taps[tap]
        grad = _grad_linear(linear, incoming[u], NORM)  # 0 behind the segment, as dy is
        grads = grads + (grad,)
        if LAST:
            grad = tl.where(row + u < CHUNK, grad, 0.0)
        added = ()
        for tap in tl.static_range(WIDTH):
            added = added + (shares[tap] + grad * window[u + tap],)
        shares = added
        # Tap t of position p reads position p - (W-1) + t: the last gradient for that of W-1 rows before.
        total = grads[u + WIDTH - 1] * taps[0]
        for tap in tl.static_range(1, WIDTH):
            total += grads[u + WIDTH - 1 - tap] * taps[tap]
        target = row + u - (WIDTH - 1)
        own = (target >= 0) & (target < count)
        if LAST and dfinal is not None:
            slot = first + target - (length - (WIDTH - 1))
            address = dfinal + (segment.to(tl.int64) * (WIDTH - 1) + slot) * F + channel
            total += tl.load(address, mask=_where(own & (slot >= 0), valid), other=0.0).to(tl.float32)
        address = dx + (chunk.to(tl.int64) * CHUNK + target) * STRIDE + column
        tl.store(address, total.to(dx.dtype.element_ty), mask=_where(own, valid))
    last_inputs = ()
    last_grads = ()
    for back in tl.static_range(WIDTH - 1):
        last_inputs = last_inputs + (window[ROWS + back],)
        last_grads = last_grads + (grads[ROWS + back],)
    return last_inputs, last_grads, shares


@helper
def _backward(
    dy, dfinal, x, weight, state, entry_of, dx, partial, segment, start, length, chunk, tokens, block,
    PART: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    GATHER: tl.constexpr = PART == 0
    NORM: tl.constexpr = PART != 2
    part_column, valid, channel = _columns(block, PART, H, K, VS, BLOCK_H, BLOCK_K)
    column = part_column + OFFSET
    first = chunk * CHUNK - start
    taps = _taps(weight, channel, valid, WIDTH)
    window = ()
    grads = ()
    shares = ()
    for back in tl.static_range(WIDTH - 1):
        value = _history(
            x, entry_of, state, segment, start, first - (WIDTH - 1) + back, length, tokens, column, valid,
            channel, F, WIDTH, STRIDE, CHOICES, GATHER,
        )  # fmt: skip
        window = window + (value,)
        grads = grads + (tl.zeros([BLOCK_H, BLOCK_K], tl.float32),)
    for _ in tl.static_range(WIDTH):
        shares = shares + (tl.zeros([BLOCK_H, BLOCK_K], tl.float32),)
    count = tl.minimum(tl.maximum(length - first, 0), CHUNK)
    whole = count // UNROLL * UNROLL
    for row in range(0, whole, UNROLL):
        window, grads, shares = _backward_rows(
            dy, dfinal, x, entry_of, dx, window, grads, shares, taps, segment, start, length, chunk, row, count, tokens,
            part_column, column, valid, channel, NORM, GATHER, STRIDE, OUT, F, WIDTH, CHOICES, CHUNK, UNROLL, False,
        )  # fmt: skip
    # Then the rows of the next chunk that this chunk's last inputs reach.
    STEP: tl.constexpr = WIDTH - 1 if WIDTH > 1 else 1
    for row in range(whole, tl.where(count > 0, count + WIDTH - 1, 0), STEP):
        window, grads, shares = _backward_rows(
            dy, dfinal, x, entry_of, dx, window, grads, shares, taps, segment, start, length, chunk, row, count, tokens,
            part_column, column, valid, channel, NORM, GATHER, STRIDE, OUT, F, WIDTH, CHOICES, CHUNK, STEP, True,
        )  # fmt: skip
    zero = tl.zeros([BLOCK_H, BLOCK_K], dx.dtype.element_ty)
    for row in range(count, CHUNK):
        tl.store(dx + (chunk.to(tl.int64) * CHUNK + row) * STRIDE + column, zero, mask=valid)
    for tap in tl.static_range(WIDTH):
        tl.store(partial + (chunk.to(tl.int64) * WIDTH + tap) * F + channel, shares[tap], mask=valid)


@triton.jit(do_not_specialize=["rows", "tokens", "segments"])
def conv_qkv_bwd_kernel(
    dq, dk, dv, dfinal, q, kv, weight, state, entry_of, segment_start, segment_length, chunk_segment, dq_rows, dkv,
    partial, rows, tokens, segments,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's inputs, and its share of the taps' gradient: ``partial [chunks, WIDTH, F]``.

    ``dfinal [segments, WIDTH - 1, F]`` is transposed: its channels are loaded as those of all others are.
    """
    KEY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (VS + BLOCK_H * BLOCK_K - 1) // (BLOCK_H * BLOCK_K)
    F: tl.constexpr = 2 * H * K + VS
    chunk, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    segment, start, length = _segment(segment_start, segment_length, chunk_segment, chunk, segments, rows)
    if block < KEY_BLOCKS:
        _backward(
            dq, dfinal, q, weight, state, entry_of, dq_rows, partial, segment, start, length, chunk, tokens,
            block, 0, H * K, 0, H * K, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    elif block < 2 * KEY_BLOCKS:
        _backward(
            dk, dfinal, kv, weight, state, entry_of, dkv, partial, segment, start, length, chunk, tokens,
            block - KEY_BLOCKS, 1, H * K + VS, 0, H * K, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        _backward(
            dv, dfinal, kv, weight, state, entry_of, dkv, partial, segment, start, length, chunk, tokens,
            block - 2 * KEY_BLOCKS, 2, H * K + VS, H * K, VS, H, K, VS, F, WIDTH, CHOICES, CHUNK, UNROLL, BLOCK_H,
            BLOCK_K,
        )  # fmt: skip


@helper
def _edge(
    dy, dfinal, x, weight, state, entry_of, out, segment, start, length, tokens, block,
    PART: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The state behind a segment; or, where dy is given, the gradient of the state before it."""
    GATHER: tl.constexpr = PART == 0
    part_column, valid, channel = _columns(block, PART, H, K, VS, BLOCK_H, BLOCK_K)
    column = part_column + OFFSET
    target = (segment.to(tl.int64) * F + channel) * (WIDTH - 1)
    if dy is None:
        for slot in tl.static_range(WIDTH - 1):
            value = _history(
                x, entry_of, state, segment, start, length - (WIDTH - 1) + slot, length, tokens, column, valid,
                channel, F, WIDTH, STRIDE, CHOICES, GATHER,
            )  # fmt: skip
            tl.store(out + target + slot, value.to(out.dtype.element_ty), mask=valid)
    else:
        taps = _taps(weight, channel, valid, WIDTH)
        values = ()
        for back in tl.static_range(2 * WIDTH - 2):
            position = tl.full([], back - (WIDTH - 1), tl.int32)
            value = _history(
                x, entry_of, state, segment, start, position, length, tokens, column, valid, channel, F, WIDTH,
                STRIDE, CHOICES, GATHER,
            )  # fmt: skip
            values = values + (value,)
        grads = ()
        for slot in tl.static_range(WIDTH - 1):
            linear = values[slot] * taps[0]
            for tap in tl.static_range(1, WIDTH):
                linear += values[slot + tap] * taps[tap]
            position = tl.full([], slot, tl.int32)
            value = _input(dy, entry_of, start, position, length, tokens, part_column, valid, OUT, 1, False)
            grads = grads + (_grad_linear(linear, value, PART != 2),)
            total = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
            for before in tl.static_range(slot + 1):
                total += grads[before] * taps[slot - before]
            if dfinal is not None:
                kept = slot - length  # a short segment keeps it
                inside = _where((kept >= 0) & (kept < WIDTH - 1), valid)
                total += tl.load(dfinal + target + kept, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + target + slot, total.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "tokens"])
def conv_qkv_edge_kernel(
    dq, dk, dv, dfinal, q, kv, weight, state, entry_of, segment_start, segment_length, out, rows, tokens,
    H: tl.constexpr, K: tl.constexpr, VS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The final state of one segment, or the gradient of its initial state where dq, dk and dv are given."""
    KEY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (VS + BLOCK_H * BLOCK_K - 1) // (BLOCK_H * BLOCK_K)
    F: tl.constexpr = 2 * H * K + VS
    segment, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    start = tl.load(segment_start + segment)
    length = _extent(start, tl.load(segment_length + segment), rows)
    if block < KEY_BLOCKS:
        _edge(
            dq, dfinal, q, weight, state, entry_of, out, segment, start, length, tokens, block,
            0, H * K, 0, H * K, H, K, VS, F, WIDTH, CHOICES, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    elif block < 2 * KEY_BLOCKS:
        _edge(
            dk, dfinal, kv, weight, state, entry_of, out, segment, start, length, tokens, block - KEY_BLOCKS,
            1, H * K + VS, 0, H * K, H, K, VS, F, WIDTH, CHOICES, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    else:
        _edge(
            dv, dfinal, kv, weight, state, entry_of, out, segment, start, length, tokens,
            block - 2 * KEY_BLOCKS,
            2, H * K + VS, H * K, VS, H, K, VS, F, WIDTH, CHOICES, BLOCK_H, BLOCK_K,
        )  # fmt: skip
