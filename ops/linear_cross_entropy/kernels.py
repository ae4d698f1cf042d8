"""Triton kernel of the cross entropy of rows of logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits, target, loss, ignore_index, V: tl.constexpr, GRADS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row: its loss, and with GRADS its gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    logits += row * V
    column = tl.arange(0, BLOCK_V)
    inside = (label >= 0) & (label < V)
    picked = tl.load(logits + label, mask=inside, other=float("nan")).to(tl.float32)
    top = tl.full([BLOCK_V], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        value = tl.load(logits + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(top - new) + tl.exp(value - new)
        top = new
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    counts = label != ignore_index
    tl.store(loss + row, tl.where(counts, log_sum - picked, 0.0))
    if GRADS:
        for start in range(0, V, BLOCK_V):
            mask = start + column < V
            value = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
            grad = tl.exp(value - log_sum) - tl.where(start + column == label, 1.0, 0.0)
            tl.store(logits + start + column, tl.where(counts, grad, 0.0), mask=mask)
