"""Triton kernels of combine and the gated RMSNorm: a token's rows are read once, what is summed stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import helper, sigmoid


@helper
def _places(
    block, tokens,
    HV: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Tokens of the tile's rows (one row for each head), whether they exist, columns of all heads, and a mask."""
    row = tl.arange(0, BLOCK_T * BLOCK_H)
    token = (block * BLOCK_T + row // BLOCK_H).to(tl.int64)
    lane = tl.arange(0, BLOCK_V)
    present = (token < tokens) & (row % BLOCK_H < HV)
    return token, present, (row % BLOCK_H * V)[:, None] + lane[None, :], present[:, None] & (lane < V)[None, :]


@helper
def _read(
    o, weights, slot_of, token, present, column, mask, rows, F: tl.constexpr, CHOICES: tl.constexpr, TOPK: tl.constexpr
):
    """Of each choice its row (-1 where it has none), values and weight; and the weighted sum."""
    slots = ()
    for j in tl.static_range(CHOICES):
        slot = tl.load(slot_of + token * CHOICES + j, mask=present, other=-1)
        slots = slots + (tl.where(slot < rows, slot, -1).to(tl.int64),)
    values = ()
    for j in tl.static_range(CHOICES):
        inside = (slots[j] >= 0)[:, None] & mask
        values = values + (tl.load(o + slots[j][:, None] * F + column, mask=inside, other=0.0),)
    shares = ()
    total = tl.zeros(mask.shape, tl.float32)
    for j in tl.static_range(CHOICES):
        share = tl.where(slots[j] >= 0, 1.0, 0.0)
        if j < TOPK:
            share *= tl.load(weights + token * TOPK + j, mask=present, other=0.0)
        shares = shares + (share,)
        total += values[j].to(tl.float32) * share[:, None]
    return slots, values, shares, total


@triton.jit(do_not_specialize=["tokens", "rows"])
def combine_norm_fwd_kernel(
    o, weights, slot_of, gate, norm_weight, y, eps, tokens, rows,
    HV: tl.constexpr, V: tl.constexpr, CHOICES: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``y[t] = RMSNorm(sum_j w_tj o[slot of (t, j)]) SiLU(gate[t])``; w is 1 from choice TOPK on."""
    token, present, column, mask = _places(tl.program_id(0), tokens, HV, V, BLOCK_T, BLOCK_H, BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    offset = token[:, None] * (HV * V) + column
    gating = tl.load(gate + offset, mask=mask, other=0.0)
    scale = tl.load(norm_weight + lane, mask=lane < V, other=0.0).to(tl.float32)
    _, _, _, total = _read(o, weights, slot_of, token, present, column, mask, rows, HV * V, CHOICES, TOPK)
    gating = gating.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, 1) / V + eps)
    result = total * rstd[:, None] * scale[None, :] * gating * sigmoid(gating)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows"])
def combine_norm_bwd_kernel(
    dy, o, weights, slot_of, gate, norm_weight, do, dweights, dgate, partial, eps, tokens, rows,
    HV: tl.constexpr, V: tl.constexpr, CHOICES: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th block of tokens; ``partial [P, V]``: its sum for the norm's weight.

    Rows that hold no token are not written.
    """
    F: tl.constexpr = HV * V
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_V)
    scale = tl.load(norm_weight + lane, mask=lane < V, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK_T * BLOCK_H, BLOCK_V], tl.float32)
    for block in range(program, tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token, present, column, mask = _places(block, tokens, HV, V, BLOCK_T, BLOCK_H, BLOCK_V)
        offset = token[:, None] * F + column
        gating = tl.load(gate + offset, mask=mask, other=0.0)
        grad = tl.load(dy + offset, mask=mask, other=0.0)
        slots, values, shares, total = _read(o, weights, slot_of, token, present, column, mask, rows, F, CHOICES, TOPK)
        gating, grad = gating.to(tl.float32), grad.to(tl.float32)
        share = sigmoid(gating)
        silu = gating * share
        rstd = (1.0 / tl.sqrt(tl.sum(total * total, 1) / V + eps))[:, None]
        normed = total * rstd
        dgated = grad * normed
        dgating = dgated * scale[None, :] * (share + silu * (1.0 - share))
        tl.store(dgate + offset, dgating.to(dgate.dtype.element_ty), mask=mask)
        dscale += dgated * silu
        dnormed = grad * scale[None, :] * silu
        dtotal = rstd * (dnormed - normed * (tl.sum(dnormed * normed, 1) / V)[:, None])
        for j in tl.static_range(CHOICES):
            inside = (slots[j] >= 0)[:, None] & mask
            value = (dtotal * shares[j][:, None]).to(do.dtype.element_ty)
            tl.store(do + slots[j][:, None] * F + column, value, mask=inside)
            if j < TOPK:
                dot = tl.sum(values[j].to(tl.float32) * dtotal, 1)
                dot = tl.sum(tl.reshape(dot, [BLOCK_T, BLOCK_H]), 1)
                own = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
                tl.store(dweights + own * TOPK + j, dot, mask=own < tokens)
    tl.store(partial + program.to(tl.int64) * V + lane, tl.sum(dscale, 0), mask=lane < V)


@triton.jit(do_not_specialize=["rows"])
def zero_pads_kernel(out, entry_of, rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Zeros in the rows that hold no token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    pad = tl.load(entry_of + row, mask=row < rows, other=0) < 0
    if tl.sum(pad.to(tl.int32), 0) > 0:
        for start in range(0, F, BLOCK_F):
            feature = start + tl.arange(0, BLOCK_F)
            address = out + row[:, None] * F + feature[None, :]
            zero = tl.zeros([BLOCK_R, BLOCK_F], out.dtype.element_ty)
            tl.store(address, zero, mask=pad[:, None] & (feature < F)[None, :])
