"""Triton kernels that the lint must refuse, on some version of Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from mom_compile.ops.memory_rule.kernels_fwd import fence_copies, finished


@triton.jit
def product_of_product(a, b, out, N: tl.constexpr):
    """The first product becomes the left operand of the second one, in registers."""
    row = tl.arange(0, N)
    left = tl.load(a + row[:, None] * N + row[None, :])
    right = tl.load(b + row[:, None] * N + row[None, :])
    between = tl.dot(left, left).to(left.dtype)
    tl.store(out + row[:, None] * N + row[None, :], tl.dot(between, right))


@triton.jit
def product_of_loads(a, b, out, steps, N: tl.constexpr, FENCE: tl.constexpr):
    """Both operands are plain loads, in a loop that may be pipelined; good with the fence."""
    row = tl.arange(0, N)
    tile = row[:, None] * N + row[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        left = tl.load(a + step * (N * N) + tile)
        right = tl.load(b + step * (N * N) + tile)
        fence_copies(FENCE)
        total = tl.dot(left, right, total)
    tl.store(out + tile, total)


@triton.jit
def product_and_sum_of_a_load(a, b, out, sums, steps, N: tl.constexpr, WAIT: tl.constexpr):
    """An operand of a pipelined product is read into registers as well; good where the product is waited for."""
    row = tl.arange(0, N)
    tile = row[:, None] * N + row[None, :]
    total = tl.zeros([N, N], tl.float32)
    along = tl.zeros([N], tl.float32)
    for step in range(steps):
        left = tl.load(a + step * (N * N) + tile)
        right = tl.load(b + step * (N * N) + tile)
        fence_copies(True)
        total = tl.dot(left, right, total)
        if WAIT:
            total = finished(total)
        along += tl.sum(left.to(tl.float32), 1)
    tl.store(out + tile, total)
    tl.store(sums + row, along)


@triton.jit
def too_many_values(a, out, steps, N: tl.constexpr):
    """N values of every thread live through a loop that uses all of them."""
    row = tl.arange(0, 128)
    column = tl.arange(0, N)
    value = tl.load(a + row[:, None] * N + column[None, :])
    for step in range(steps):
        value = value * tl.load(a + step * 128 + row)[:, None] + tl.sum(value, 1)[:, None]
    tl.store(out + row[:, None] * N + column[None, :], value)
