"""Triton kernels of the decode step: one token's pass over the selected states, then the sum and the new windows.

Every program works out the routing of its token again, which is cheaper than one more launch. The windows of the
convolution are read by all programs of a memory and therefore advanced by the second kernel only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import after_previous, helper, softplus


@helper
def _selection(
    logits, indices, weights, valid, token, logits_stride, rank,
    M: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Memory, weight and use (0 or 1) of the choice ``rank`` of a token; rank TOPK is the shared memory."""
    column = tl.arange(0, BLOCK_M)
    memory = tl.full([], M, tl.int32)
    weight = tl.full([], 1.0, tl.float32)
    use = tl.full([], 1, tl.int32)
    if rank < TOPK:
        if indices is None:
            free = column < M
            value = tl.load(logits + token * logits_stride + column, mask=free, other=float("-inf"))
            key = tl.where(value == value, value, float("inf"))  # NaN is chosen first, as mom::route does
            total = tl.full([], 0.0, tl.float32)
            weight = tl.full([], 0.0, tl.float32)
            top = tl.full([], 0.0, tl.float32)
            for j in range(TOPK):
                best = tl.max(tl.where(free, key, float("-inf")), 0)
                index = tl.min(tl.where(free & (key == best), column, BLOCK_M), 0)
                picked = tl.sum(tl.where(column == index, value, 0.0), 0)
                top = tl.where(j == 0, picked, top)
                share = tl.exp(picked - top)
                total += share
                weight = tl.where(j == rank, share, weight)
                memory = tl.where(j == rank, index, memory)
                free = free & (column != index)
            weight = weight / total
        else:
            choice = tl.arange(0, BLOCK_K)
            index = tl.load(indices + token * TOPK + choice, mask=choice < TOPK, other=-1)
            inside = (index >= 0) & (index < M)
            index = tl.where(inside, index, -1).to(tl.int32)
            mine = choice == rank
            memory = tl.sum(tl.where(mine, index, 0), 0)
            repeated = tl.sum(((index == memory) & (choice < rank)).to(tl.int32), 0)
            use = ((memory >= 0) & (repeated == 0)).to(tl.int32)
            if weights is None:
                value = tl.load(logits + token * logits_stride + index, mask=inside, other=float("-inf"))
                share = tl.where(inside, tl.exp(value - tl.max(value, 0)), 0.0)
                weight = tl.sum(tl.where(mine, share, 0.0), 0) / tl.sum(share, 0)
            else:
                weight = tl.load(weights + token * TOPK + rank)
    if valid is not None:
        use = use * (tl.load(valid + token) != 0).to(tl.int32)
    memory = tl.where(use != 0, memory, 0)
    return memory, weight, use


@helper
def _activated(x, conv_state, conv_weight, source, channel, mask, WIDTH: tl.constexpr):
    """Convolution (WIDTH > 0) and SiLU of one input per channel, float32; ``source`` and ``channel`` are offsets."""
    value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    if WIDTH > 0:
        value *= tl.load(conv_weight + channel * WIDTH + WIDTH - 1, mask=mask, other=0.0).to(tl.float32)
        for tap in tl.static_range(WIDTH - 1):
            old = tl.load(conv_state + channel * (WIDTH - 1) + tap, mask=mask, other=0.0).to(tl.float32)
            value += old * tl.load(conv_weight + channel * WIDTH + tap, mask=mask, other=0.0).to(tl.float32)
    return value * tl.sigmoid(value)


@triton.jit(
    do_not_specialize=[
        "t", "tokens", "q_stride", "kv_stride", "logits_stride", "a_stride", "b_stride", "scale",
    ]
)  # fmt: skip
def decode_state_kernel(
    q, kv, logits, indices, weights, a, b, A_log, dt_bias, conv_weight, state, conv_state, valid, y,
    t, tokens, q_stride, kv_stride, logits_stride, a_stride, b_stride, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, TOPK: tl.constexpr,
    SHARED: tl.constexpr, SINGLE: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr,
    TIMES_DT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One sequence, choice, value head and block of V: the state is read once and written once.

    GATE: 0 none, 1 constant per head, 2 from ``a``. ``y`` ``[B, k', HV, V]`` takes the weighted read.
    """
    CHOICES: tl.constexpr = TOPK + SHARED
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    block, pid = pid % BLOCKS, pid // BLOCKS
    head, pid = pid % HV, pid // HV
    rank = pid % CHOICES
    sequence = (pid // CHOICES).to(tl.int64)
    token = sequence * tokens + t
    if PDL:
        after_previous()
    memory, weight, use = _selection(
        logits, indices, weights, valid, token, logits_stride, rank, M, TOPK, BLOCK_M, BLOCK_K
    )
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    result = y + ((sequence * CHOICES + rank) * HV + head) * V + value
    if use == 0:
        tl.store(result, tl.full([BV], 0.0, tl.float32), mask=value < V)
        return
    entry = sequence * (M + SHARED) + memory
    pointers = state + (entry * HV + head) * (K * V) + key[:, None] * V + value[None, :]
    mask = (key < K)[:, None] & (value < V)[None, :]
    s = tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)

    CHANNELS: tl.constexpr = 2 * H * K + HV * V
    group = memory * (1 - SINGLE)
    kv_row = kv + token * kv_stride + group * (H * K + HV * V)
    window = conv_state
    if WIDTH > 0:
        window = conv_state + entry * (CHANNELS * (WIDTH - 1))
    q_channel = head // (HV // H) * K + key
    v_channel = head * V + value
    q_row = _activated(q + token * q_stride, window, conv_weight, q_channel, q_channel, key < K, WIDTH)
    k_row = _activated(kv_row, window, conv_weight, q_channel, H * K + q_channel, key < K, WIDTH)
    update = _activated(kv_row, window, conv_weight, H * K + v_channel, 2 * H * K + v_channel, value < V, WIDTH)
    q_row *= scale / tl.sqrt(tl.sum(q_row * q_row, 0) + 1e-6)
    k_row *= 1.0 / tl.sqrt(tl.sum(k_row * k_row, 0) + 1e-6)

    decay = tl.full([], 1.0, tl.float32)
    if GATE == 1:
        decay = 1.0 - tl.exp2(-5.0 - head)
    if GATE == 2:
        dt = tl.load(a + token * a_stride + group * HV + head).to(tl.float32)
        dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
        decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * dt)
        if TIMES_DT:
            update *= dt
    if GATE > 0:
        s *= decay
    out = tl.sum(s * q_row[:, None], 0)
    if DELTA:
        rate = tl.sigmoid(tl.load(b + token * b_stride + group * HV + head).to(tl.float32))
        update = rate * (update - tl.sum(s * k_row[:, None], 0))
    out += update * tl.sum(k_row * q_row, 0)
    s += k_row[:, None] * update[None, :]
    tl.store(pointers, s.to(state.dtype.element_ty), mask=mask, eviction_policy=EVICT)
    tl.store(result, weight * out, mask=value < V)


@triton.jit(do_not_specialize=["t", "tokens", "q_stride", "kv_stride", "logits_stride", "gate_stride", "eps"])
def decode_combine_kernel(
    q, kv, logits, indices, weights, conv_state, valid, y, norm_weight, gate, o,
    t, tokens, q_stride, kv_stride, logits_stride, gate_stride, eps,
    KEYS: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, M: tl.constexpr, TOPK: tl.constexpr, SHARED: tl.constexpr,
    SINGLE: tl.constexpr, WIDTH: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, ELEMENTS: tl.constexpr,
    MOVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``o`` as the sum of ``y`` over the choices, normed and gated; the selected windows moved on by one input.

    KEYS is H * K; a program takes BH heads of one sequence, or MOVED channels of a window, which fill at most ELEMENTS.
    """
    VALUES: tl.constexpr = HV * V
    CHOICES: tl.constexpr = TOPK + SHARED
    CHANNELS: tl.constexpr = 2 * KEYS + VALUES
    SUMS: tl.constexpr = (HV + BH - 1) // BH
    MOVES: tl.constexpr = (CHANNELS + MOVED - 1) // MOVED
    PROGRAMS: tl.constexpr = SUMS + CHOICES * MOVES * (WIDTH > 0)
    pid = tl.program_id(0)
    sequence = (pid // PROGRAMS).to(tl.int64)
    part = pid % PROGRAMS
    token = sequence * tokens + t
    # The state kernel writes only y and the states: everything else is there before it ends.
    if part < SUMS:
        head, column = part * BH + tl.arange(0, BH), tl.arange(0, BV)
        value = head[:, None] * V + column[None, :]
        mask = (head < HV)[:, None] & (column < V)[None, :]
        if norm_weight is not None:
            factor = tl.load(norm_weight + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
            if gate is not None:
                gating = tl.load(gate + token * gate_stride + value, mask=mask, other=0.0).to(tl.float32)
                factor = factor * gating * tl.sigmoid(gating)
        if PDL:
            after_previous()
        total = tl.zeros([BH, BV], tl.float32)
        for rank in tl.static_range(CHOICES):
            total += tl.load(y + (sequence * CHOICES + rank) * VALUES + value, mask=mask, other=0.0)
        if norm_weight is not None:
            # Rounded first, as the sum without a norm is.
            total = total.to(o.dtype.element_ty).to(tl.float32)
            total = total * (1.0 / tl.sqrt(tl.sum(total * total, 1) / V + eps))[:, None]
            total *= factor
        tl.store(o + token * VALUES + value, total.to(o.dtype.element_ty), mask=mask)
        return
    if WIDTH > 0:
        rank = (part - SUMS) // MOVES
        # A block of whole channels, element by element: every element takes the one after it, the last the input.
        element = tl.arange(0, ELEMENTS)
        first = (part - SUMS) % MOVES * MOVED
        channel, tap = first + element // (WIDTH - 1), element % (WIDTH - 1)
        mask = (element < MOVED * (WIDTH - 1)) & (channel < CHANNELS)
        newest = tap == WIDTH - 2
        memory, weight, use = _selection(
            logits, indices, weights, valid, token, logits_stride, rank, M, TOPK, BLOCK_M, BLOCK_K
        )
        if use == 0:
            return
        kv_row = kv + token * kv_stride + memory * (1 - SINGLE) * (KEYS + VALUES)
        new = tl.load(q + token * q_stride + channel, mask=mask & newest & (channel < KEYS), other=0.0).to(tl.float32)
        new += tl.load(kv_row + channel - KEYS, mask=mask & newest & (channel >= KEYS), other=0.0).to(tl.float32)
        window = conv_state + ((sequence * (M + SHARED) + memory) * CHANNELS + first) * (WIDTH - 1) + element
        old = tl.load(window + 1, mask=mask & (tap < WIDTH - 2), other=0.0)
        if PDL:
            after_previous()
        # Other threads read what this one overwrites.
        tl.debug_barrier()
        tl.store(window, tl.where(newest, new.to(conv_state.dtype.element_ty), old), mask=mask)
