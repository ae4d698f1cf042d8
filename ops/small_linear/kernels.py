"""Triton kernels of the linear map to few outputs.

bfloat16 tiles are multiplied as they are. A float32 gradient enters as the sum of two bfloat16 numbers, which leaves
2^-17 of it out. Tiles of 32 rows keep to ``mma.sync``: no product here is asynchronous (see ``_ptx_lint``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import product


@triton.jit(do_not_specialize=["tokens"])
def small_linear_fwd_kernel(
    x, weight, y, tokens,
    N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    OUTPUT_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token = (tl.program_id(0) // OUTPUT_BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(0) % OUTPUT_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        inner = first + lane
        left, right = (token < tokens)[:, None], (output < N)[None, :]
        if D % BLOCK_D != 0:
            left, right = left & (inner < D)[None, :], right & (inner < D)[:, None]
        a = tl.load(x + token[:, None] * D + inner[None, :], mask=left, other=0.0)
        b = tl.load(weight + output[None, :] * D + inner[:, None], mask=right, other=0.0)
        total = product(a, b, total)
    tl.store(y + token[:, None] * N + output[None, :], total, mask=(token < tokens)[:, None] & (output < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def small_linear_dx_kernel(
    dy, weight, dx, tokens,
    N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile ``dx = dy weight``."""
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    token = (tl.program_id(0) // COLUMN_BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inner = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        mask = (token < tokens)[:, None] & (output < N)[None, :]
        grad = tl.load(dy + token[:, None] * N + output[None, :], mask=mask, other=0.0)
        mask = (output < N)[:, None] & (inner < D)[None, :]
        b = tl.load(weight + output[:, None] * D + inner[None, :], mask=mask, other=0.0)
        if weight.dtype.element_ty == tl.bfloat16:
            high = grad.to(tl.bfloat16)
            total = product((grad - high.to(tl.float32)).to(tl.bfloat16), b, total)
            total = product(high, b, total)
        else:
            total = product(grad, b.to(tl.float32), total)
    mask = (token < tokens)[:, None] & (inner < D)[None, :]
    tl.store(dx + token[:, None] * D + inner[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "span"])
def small_linear_dweight_kernel(
    dy, x, partial, tokens, span,
    N: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of ``dy^T x`` over ``span`` tokens: ``partial [P, n, D]``."""
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    OUTPUT_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    part, tile = tl.program_id(0) // (COLUMN_BLOCKS * OUTPUT_BLOCKS), tl.program_id(0) % (COLUMN_BLOCKS * OUTPUT_BLOCKS)
    inner = tile // OUTPUT_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    output = tile % OUTPUT_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_T)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, tokens)
    total = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for step in range(0, span, BLOCK_T):
        token = begin + step + lane
        inside = token < end
        a = tl.load(x + token[None, :] * D + inner[:, None], mask=inside[None, :] & (inner < D)[:, None], other=0.0)
        mask = inside[:, None] & (output < N)[None, :]
        grad = tl.load(dy + token[:, None] * N + output[None, :], mask=mask, other=0.0)
        if x.dtype.element_ty == tl.bfloat16:
            high = grad.to(tl.bfloat16)
            total = product(a, (grad - high.to(tl.float32)).to(tl.bfloat16), total)
            total = product(a, high, total)
        else:
            total = product(a.to(tl.float32), grad, total)
    target = partial + (part.to(tl.int64) * N + output[None, :]) * D + inner[:, None]
    tl.store(target, total, mask=(output < N)[None, :] & (inner < D)[:, None])
