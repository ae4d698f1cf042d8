"""Triton kernels of the grouped linear map."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import product


@triton.jit
def _group_bound(group_offset, index, rows):
    """A group's bound; a wrong one is brought into range, so that no address leaves the rows."""
    return tl.minimum(tl.maximum(tl.load(group_offset + index), 0), rows)


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_fwd_kernel(
    x,
    weight,
    group_offset,
    y,
    rows,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE_G: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of y. The rows of an aligned tile lie in one group; others are gone through group by group."""
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_BLOCKS * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    last_row = tl.minimum(first_row + BLOCK_R, rows) - 1

    index = tl.arange(0, BLOCK_G)
    end = tl.load(group_offset + 1 + index, mask=index < G, other=2147483647)
    first_group = tl.sum((end <= first_row).to(tl.int32), 0)
    last_group = tl.minimum(tl.sum((end <= last_row).to(tl.int32), 0), G - 1)

    out = y + row.to(tl.int64)[:, None] * N + column[None, :]
    # Rows past the last group, and before the first one, are zero.
    low = _group_bound(group_offset, 0, rows)
    high = _group_bound(group_offset, G, rows)
    outside = ((row < low) | (row >= high)) & (row < rows)
    zero = tl.zeros([BLOCK_R, BLOCK_N], y.dtype.element_ty)
    tl.store(out, zero, mask=outside[:, None] & (column < N)[None, :])

    lane = tl.arange(0, BLOCK_D)
    for group in range(first_group, last_group + 1):
        low = _group_bound(group_offset, group, rows)
        high = _group_bound(group_offset, group + 1, rows)
        own = (row >= low) & (row < high)
        left = x + row.to(tl.int64)[:, None] * D + lane[None, :]
        right = weight + (group + tl.zeros([], tl.int64)) * STRIDE_G + column.to(tl.int64)[None, :] * STRIDE_N
        right += lane.to(tl.int64)[:, None] * STRIDE_D
        total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for first in range(0, D, BLOCK_D):
            left_mask = own[:, None]
            right_mask = (column < N)[None, :]
            if D % BLOCK_D != 0:
                left_mask = left_mask & (first + lane < D)[None, :]
                right_mask = right_mask & (first + lane < D)[:, None]
            a = tl.load(left, mask=left_mask, other=0.0)
            b = tl.load(right, mask=right_mask, other=0.0)
            total = product(a, b, total)
            left += BLOCK_D
            right += BLOCK_D * STRIDE_D
        tl.store(out, total.to(y.dtype.element_ty), mask=own[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_dweight_kernel(
    dy,
    x,
    group_offset,
    dweight,
    rows,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of one group's ``dy^T x``; zero for a group without rows."""
    COLUMN_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    INNER_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    group = program // (COLUMN_BLOCKS * INNER_BLOCKS)
    column = program // INNER_BLOCKS % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = program % INNER_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    low = _group_bound(group_offset, group, rows)
    high = _group_bound(group_offset, group + 1, rows)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(low, high, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        own = row < high
        wide = row.to(tl.int64)
        a = tl.load(dy + wide[None, :] * N + column[:, None], mask=own[None, :] & (column < N)[:, None], other=0.0)
        b = tl.load(x + wide[:, None] * D + inner[None, :], mask=own[:, None] & (inner < D)[None, :], other=0.0)
        total = product(a, b, total)
    out = dweight + (group.to(tl.int64) * N + column)[:, None] * D + inner[None, :]
    tl.store(out, total.to(dweight.dtype.element_ty), mask=(column < N)[:, None] & (inner < D)[None, :])


@triton.jit(do_not_specialize=["rows"])
def ends_kernel(group_offset, ends, rows, G: tl.constexpr, BLOCK_G: tl.constexpr):
    """The groups' ends, rising and within the rows whatever the table holds."""
    index = tl.arange(0, BLOCK_G)
    highest = tl.zeros([BLOCK_G], tl.int32)
    for group in range(G):
        end = _group_bound(group_offset, group + 1, rows)
        highest = tl.where(index >= group, tl.maximum(highest, end), highest)
    tl.store(ends + index, highest, mask=index < G)


@triton.jit(do_not_specialize=["rows"])
def zero_tail_kernel(
    y, ends, rows, G: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Zeros in the rows that belong to no group."""
    first = tl.program_id(0) * BLOCK_R
    end = tl.load(ends + (G - 1))
    if first + BLOCK_R <= end:
        return
    row = first + tl.arange(0, BLOCK_R)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        address = y + row.to(tl.int64)[:, None] * N + column[None, :]
        mask = ((row >= end) & (row < rows))[:, None] & (column < N)[None, :]
        tl.store(address, tl.zeros([BLOCK_R, BLOCK_N], y.dtype.element_ty), mask=mask)
