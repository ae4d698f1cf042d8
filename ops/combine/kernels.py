"""Triton kernel of the routing weights' gradient; the rest of combine is the weighted form of permute's kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "rows"])
def dweights_kernel(
    dy,
    o,
    slot_of,
    dweights,
    tokens,
    rows,
    F: tl.constexpr,
    CHOICES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``dweights[t, j] = dy[t] . o[slot of (t, j)]``."""
    program = tl.program_id(0).to(tl.int64)
    token = program // TOPK * BLOCK_T + tl.arange(0, BLOCK_T)
    j = program % TOPK
    present = token < tokens
    slot = tl.load(slot_of + token * CHOICES + j, mask=present, other=-1)
    hit = (slot >= 0) & (slot < rows)
    total = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for first in range(0, F, BLOCK_F):
        feature = first + tl.arange(0, BLOCK_F)
        mask = hit[:, None] & (feature < F)[None, :]
        value = tl.load(o + slot.to(tl.int64)[:, None] * F + feature[None, :], mask=mask, other=0.0)
        grad = tl.load(dy + token[:, None] * F + feature[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32) * grad.to(tl.float32)
    tl.store(dweights + token * TOPK + j, tl.sum(total, 1), mask=present)
