"""Triton kernels that copy token rows to aligned rows and sum them back; ``combine`` uses them with weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "rows"])
def to_rows_kernel(
    x,
    weights,
    entry_of,
    out,
    tokens,
    rows,
    F: tl.constexpr,
    CHOICES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``out[r] = w x[token of r]``, zero on pad rows; w is 1 from choice TOPK on."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0).to(tl.int64)
    row = program // FEATURE_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = program % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    entry = tl.load(entry_of + row, mask=row < rows, other=-1)
    token = entry // CHOICES
    real = (entry >= 0) & (token < tokens)
    mask = (feature < F)[None, :]
    value = tl.load(x + token.to(tl.int64)[:, None] * F + feature[None, :], mask=real[:, None] & mask, other=0.0)
    if TOPK > 0:
        choice = entry % CHOICES
        weighted = real & (choice < TOPK)
        weight = tl.load(weights + token.to(tl.int64) * TOPK + choice, mask=weighted, other=0.0)
        value = value.to(tl.float32) * tl.where(choice < TOPK, weight, 1.0)[:, None]
        value = tl.where(real[:, None], value, 0.0)
    target = out + row[:, None] * F + feature[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & mask)


@triton.jit(do_not_specialize=["tokens", "rows"])
def to_tokens_kernel(
    o,
    weights,
    slot_of,
    out,
    tokens,
    rows,
    F: tl.constexpr,
    CHOICES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``out[t] = sum_j w_tj o[slot of (t, j)]``; w is 1 from choice TOPK on."""
    FEATURE_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0).to(tl.int64)
    token = program // FEATURE_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = program % FEATURE_BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    present = token < tokens
    mask = (feature < F)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    for j in tl.static_range(CHOICES):
        slot = tl.load(slot_of + token * CHOICES + j, mask=present, other=-1)
        hit = (slot >= 0) & (slot < rows)
        value = tl.load(o + slot.to(tl.int64)[:, None] * F + feature[None, :], mask=hit[:, None] & mask, other=0.0)
        if j < TOPK:
            weight = tl.load(weights + token * TOPK + j, mask=hit, other=0.0)
            total += value.to(tl.float32) * weight[:, None]
        else:
            total += value.to(tl.float32)
    target = out + token[:, None] * F + feature[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=present[:, None] & mask)
