"""Triton kernel of the cross entropy of rows of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import exp

GROUP = tl.constexpr(8)
"""Neighbours that share a running maximum: one thread's load of 16 bytes, so that few exponentials rescale sums."""


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits, target, loss, ignore_index, V: tl.constexpr, GRADS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row: its loss, and with GRADS its gradient in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    logits += row * V
    column = tl.arange(0, BLOCK_V // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (label >= 0) & (label < V)
    picked = tl.load(logits + label, mask=inside, other=float("nan")).to(tl.float32)
    top = tl.full([BLOCK_V // GROUP], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_V // GROUP], tl.float32)
    for start in range(0, V, BLOCK_V):
        value = tl.load(logits + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(value, 1), propagate_nan=tl.PropagateNan.ALL)
        total = total * exp(top - new) + tl.sum(exp(value - new[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * exp(top - highest), 0))
    counts = label != ignore_index
    tl.store(loss + row, tl.where(counts, log_sum - picked, 0.0))
    if GRADS:
        if counts:
            for start in range(0, V, BLOCK_V):
                mask = start + column < V
                value = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
                tl.store(logits + start + column, exp(value - log_sum).to(logits.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # of two threads that write the label's gradient, this is the later
            grad = exp(picked - log_sum) - 1.0
            tl.store(logits + label, grad.to(logits.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK_V):
                zero = tl.zeros([BLOCK_V // GROUP, GROUP], logits.dtype.element_ty)
                tl.store(logits + start + column, zero, mask=start + column < V)
