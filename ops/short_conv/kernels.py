"""Triton kernels of the short convolution over aligned segments."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import helper


@helper
def _source(
    x, state, segment, start, position, feature, length, rows, F: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr
):
    """``[R, BLOCK_F]`` float32: the input at ``position`` in the segment, below 0 from the state before it.

    NEAR says whether a position may lie below 0. Positions outside ``[-(WIDTH-1), length)`` give zero.
    """
    row = start + position
    inside = (position >= 0) & (position < length) & (row >= 0) & (row < rows)
    channel = (feature < F)[None, :]
    address = x + row.to(tl.int64)[:, None] * F + feature[None, :]
    value = tl.load(address, mask=inside[:, None] & channel, other=0.0).to(tl.float32)
    if NEAR and state is not None:
        old = WIDTH - 1 + position
        before = (position < 0) & (old >= 0)
        address = state + (segment.to(tl.int64) * F + feature)[None, :] * (WIDTH - 1) + old[:, None]
        value += tl.load(address, mask=before[:, None] & channel, other=0.0).to(tl.float32)
    return value


@helper
def _convolve(
    x,
    weight,
    state,
    segment,
    start,
    position,
    feature,
    length,
    rows,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The convolution before its activation at ``position``."""
    linear = tl.zeros([position.shape[0], feature.shape[0]], tl.float32)
    for tap in range(WIDTH):
        factor = tl.load(weight + feature * WIDTH + tap, mask=feature < F, other=0.0).to(tl.float32)
        back = position + (tap - (WIDTH - 1))
        linear += _source(x, state, segment, start, back, feature, length, rows, F, WIDTH, NEAR) * factor[None, :]
    return linear


@helper
def _at(grad, start, position, feature, length, rows, F: tl.constexpr):
    """``[R, BLOCK_F]`` float32: the gradient before the activation at ``position``; zero outside the segment."""
    row = start + position
    inside = (position >= 0) & (position < length) & (row >= 0) & (row < rows)
    address = grad + row.to(tl.int64)[:, None] * F + feature[None, :]
    return tl.load(address, mask=inside[:, None] & (feature < F)[None, :], other=0.0).to(tl.float32)


@helper
def _segment(segment_start, segment_length, chunk_segment, chunk, segments):
    """Segment of a chunk, its first row and length (0 where the chunk is unused)."""
    segment = tl.load(chunk_segment + chunk)
    used = (segment >= 0) & (segment < segments)
    segment = tl.where(used, segment, 0)
    start = tl.load(segment_start + segment, mask=used, other=0)
    length = tl.load(segment_length + segment, mask=used, other=0)
    return segment, start, length


@triton.jit(do_not_specialize=["rows", "segments"])
def short_conv_kernel(
    dy,
    x,
    weight,
    state,
    segment_start,
    segment_length,
    chunk_segment,
    y,
    rows,
    segments,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """y; or, where dy is given, the gradient before the activation, ``dy`` times the activation's derivative."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    block = tl.program_id(0) // FEATURE_BLOCKS
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    chunk = block // (CHUNK // BLOCK_R)
    segment, start, length = _segment(segment_start, segment_length, chunk_segment, chunk, segments)
    first = block * BLOCK_R - start
    position = first + tl.arange(0, BLOCK_R)
    if first < WIDTH - 1:
        linear = _convolve(x, weight, state, segment, start, position, feature, length, rows, F, WIDTH, True)
    else:
        linear = _convolve(x, weight, state, segment, start, position, feature, length, rows, F, WIDTH, False)
    if dy is None:
        if SILU:
            linear = linear * tl.sigmoid(linear)
    else:
        grad = _at(dy, start, position, feature, length, rows, F)
        if SILU:
            sigmoid = tl.sigmoid(linear)
            grad = grad * sigmoid * (1.0 + linear * (1.0 - sigmoid))
        linear = grad
    real = (position >= 0) & (position < length)
    row = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    result = tl.where(real[:, None], linear, 0.0).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * F + feature[None, :], result, mask=(feature < F)[None, :])


@triton.jit(do_not_specialize=["rows", "segments"])
def final_state_kernel(
    x,
    state,
    segment_start,
    segment_length,
    final_state,
    rows,
    segments,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The last WIDTH-1 inputs of each segment; a short segment keeps some of the state before it."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    segment = tl.program_id(0) // FEATURE_BLOCKS
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(segment_start + segment)
    length = tl.load(segment_length + segment)
    slot = tl.arange(0, BLOCK_W)
    value = _source(x, state, segment, start, length - (WIDTH - 1) + slot, feature, length, rows, F, WIDTH, True)
    address = final_state + (segment.to(tl.int64) * F + feature)[None, :] * (WIDTH - 1) + slot[:, None]
    mask = (slot < WIDTH - 1)[:, None] & (feature < F)[None, :]
    tl.store(address, value.to(final_state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "segments"])
def short_conv_bwd_kernel(
    grad,
    dfinal,
    x,
    weight,
    state,
    segment_start,
    segment_length,
    chunk_segment,
    dx,
    partial,
    rows,
    segments,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dx of one chunk, and its share of the taps' gradient: ``partial [chunks, WIDTH, F]``."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    chunk = tl.program_id(0) // FEATURE_BLOCKS
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    channel = feature < F
    segment, start, length = _segment(segment_start, segment_length, chunk_segment, chunk, segments)
    # One tile for each tap, summed over its rows at the end: a sum between the loads would make each wait for it.
    shares = ()
    for _ in tl.static_range(WIDTH):
        shares = shares + (tl.zeros([BLOCK_R, BLOCK_F], tl.float32),)
    for step in range(CHUNK // BLOCK_R):
        first = chunk * CHUNK + step * BLOCK_R - start
        position = first + tl.arange(0, BLOCK_R)
        here = _at(grad, start, position, feature, length, rows, F)
        total = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
        added = ()
        for tap in tl.static_range(WIDTH):
            # This tap reads this row for the position that lies WIDTH-1-tap later.
            later = _at(grad, start, position + (WIDTH - 1 - tap), feature, length, rows, F)
            factor = tl.load(weight + feature * WIDTH + tap, mask=channel, other=0.0).to(tl.float32)
            total += later * factor[None, :]
            back = position + (tap - (WIDTH - 1))
            value = _source(x, state, segment, start, back, feature, length, rows, F, WIDTH, True)
            added = added + (shares[tap] + here * value,)
        shares = added
        real = (position >= 0) & (position < length)
        if dfinal is not None:
            if first + BLOCK_R > length - (WIDTH - 1):
                slot = position - (length - (WIDTH - 1))
                address = dfinal + (segment.to(tl.int64) * F + feature)[None, :] * (WIDTH - 1) + slot[:, None]
                mask = (real & (slot >= 0))[:, None] & channel[None, :]
                total += tl.load(address, mask=mask, other=0.0).to(tl.float32)
        row = chunk.to(tl.int64) * CHUNK + step * BLOCK_R + tl.arange(0, BLOCK_R)
        result = tl.where(real[:, None], total, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + row[:, None] * F + feature[None, :], result, mask=channel[None, :])
    for tap in tl.static_range(WIDTH):
        address = partial + (chunk.to(tl.int64) * WIDTH + tap) * F + feature
        tl.store(address, tl.sum(shares[tap], 0), mask=channel)


@triton.jit(do_not_specialize=["rows", "segments"])
def initial_state_kernel(
    grad,
    dfinal,
    weight,
    segment_start,
    segment_length,
    dstate,
    rows,
    segments,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The state before a segment is read by its first WIDTH-1 positions, and kept by a short segment."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    segment = tl.program_id(0) // FEATURE_BLOCKS
    feature = tl.program_id(0) % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(segment_start + segment)
    length = tl.load(segment_length + segment)
    slot = tl.arange(0, BLOCK_W)
    channel = (feature < F)[None, :]
    total = tl.zeros([BLOCK_W, BLOCK_F], tl.float32)
    for tap in range(WIDTH - 1):
        factor = tl.load(weight + feature * WIDTH + tap, mask=feature < F, other=0.0).to(tl.float32)
        # slot - tap: the position whose tap reads this slot.
        total += _at(grad, start, slot - tap, feature, length, rows, F) * factor[None, :]
    offset = (segment.to(tl.int64) * F + feature)[None, :] * (WIDTH - 1)
    if dfinal is not None:
        kept = slot - length
        mask = ((kept >= 0) & (kept < WIDTH - 1) & (slot < WIDTH - 1))[:, None] & channel
        total += tl.load(dfinal + offset + kept[:, None], mask=mask, other=0.0).to(tl.float32)
    mask = (slot < WIDTH - 1)[:, None] & channel
    tl.store(dstate + offset + slot[:, None], total.to(dstate.dtype.element_ty), mask=mask)
