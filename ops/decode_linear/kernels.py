"""Triton kernels of the linear layer of a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_kernels import after_previous, helper, product


@helper
def _whole_row(x, norm_weight, row, eps, F: tl.constexpr, BF: tl.constexpr, NORM: tl.constexpr):
    """f(x) of one row ``[BF]``, rounded to the dtype of x, as float32."""
    feature = tl.arange(0, BF)
    mask = feature < F
    value = tl.load(x + row * F + feature, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / F + eps))
        if norm_weight is not None:
            value *= tl.load(norm_weight + feature, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@helper
def _small_product(
    x, norm_weight, small_weight, small, row, block, eps,
    F: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row and a block of the small product."""
    output = block * BP + tl.arange(0, BP)
    feature = tl.arange(0, BF)
    mask = (output < P)[:, None] & (feature < F)[None, :]
    tile = tl.load(small_weight + output[:, None] * F + feature[None, :], mask=mask, other=0.0)
    if PDL:
        after_previous()
    value = _whole_row(x, norm_weight, row, eps, F, BF, NORM)
    tl.store(small + row * P + output, tl.sum(tile * value[None, :], 1), mask=output < P)


@triton.jit(do_not_specialize=["eps"])
def decode_row_kernel(
    x, weight, norm_weight, small_weight, y, small, eps,
    F: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr,
    BF: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row and a block of outputs: first of ``weight`` (added to y where ADD), then of the small one.

    OUT counts what is stored; with SWIGLU ``weight`` has twice as many rows.
    """
    BLOCKS: tl.constexpr = (OUT + BO - 1) // BO
    PROGRAMS: tl.constexpr = BLOCKS + (P + BP - 1) // BP
    pid = tl.program_id(0)
    # Rows next to each other share the weights in cache.
    row = (pid // PROGRAMS).to(tl.int64)
    block = pid % PROGRAMS
    feature = tl.arange(0, BF)
    if block < BLOCKS:
        output = block * BO + tl.arange(0, BO)
        mask = (output < OUT)[:, None] & (feature < F)[None, :]
        source = weight + output.to(tl.int64)[:, None] * F + feature[None, :]
        # The weights first: they are on their way while the row is prepared, or still being computed.
        tile = tl.load(source, mask=mask, other=0.0)
        if SWIGLU:
            second = tl.load(source + OUT * F, mask=mask, other=0.0)
        if PDL:
            after_previous()
        value = _whole_row(x, norm_weight, row, eps, F, BF, NORM)
        total = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        if SWIGLU:
            total = total * tl.sigmoid(total) * tl.sum(second.to(tl.float32) * value[None, :], 1)
        target = row * OUT + output
        if ADD:
            total += tl.load(y + target, mask=output < OUT, other=0.0).to(tl.float32)
        tl.store(y + target, total.to(y.dtype.element_ty), mask=output < OUT)
    else:
        if P > 0:
            _small_product(x, norm_weight, small_weight, small, row, block - BLOCKS, eps, F, P, NORM, BF, BP, PDL)


@helper
def _prefetch(weight, first, end):
    """Bring ``weight`` from element ``first`` to before ``end`` into L2, in whole 16 bytes; nothing waits for it."""
    begin = (weight + first).to(tl.int64, bitcast=True) & ~15
    size = ((weight + end).to(tl.int64, bitcast=True) - begin).to(tl.int32) & ~15
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ne.and.u32 p, $2, 0, p; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [begin, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@helper
def _over_warps(total):
    """The sum over the four warps of a product ``[4, BR, BO]``, one way for all through shared memory.

    A sum over that axis would send one number of each thread after the other, which takes longer than the product.
    """
    halves = tl.reshape(tl.permute(total, (1, 2, 0)), (total.shape[1], total.shape[2], 2, 2))
    left, right = tl.split(halves)
    left, right = tl.split(left + right)
    return left + right


@triton.jit(do_not_specialize=["rows", "eps"])
def decode_tile_kernel(
    x, weight, norm_weight, small_weight, y, small, rows, eps,
    F: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, ADD: tl.constexpr,
    BF: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
    PARALLEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows (at most BR) and a block of outputs on tensor cores, then one row and a block of the small product.

    The BK features of a turn are PARALLEL products, one of each warp: one after the other, they would take longer than
    their weights do to arrive. The norm has no weight here: its factor of a row stands behind the product, and the sums
    of squares are the diagonal of one more product, so that x goes from memory to the tensor cores as it is.
    """
    PARTS: tl.constexpr = (P + BP - 1) // BP
    PIECE: tl.constexpr = BK // PARALLEL
    BLOCKS: tl.constexpr = (OUT + BO - 1) // BO
    tl.static_assert(PARALLEL == 4)
    block = tl.program_id(0)
    if block < BLOCKS:
        if PDL:
            first = block.to(tl.int64) * (BO * F)
            end = tl.minimum(first + BO * F, OUT * F)
            _prefetch(weight, first, end)
            if SWIGLU:
                _prefetch(weight + OUT * F, first, end)
            after_previous()
        row, output = tl.arange(0, BR), block * BO + tl.arange(0, BO)
        piece = tl.arange(0, PARALLEL)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        total = tl.zeros([PARALLEL, BR, BO], tl.float32)
        right = tl.zeros([PARALLEL, BR, BO], tl.float32)
        squares = tl.zeros([PARALLEL, BR, BR], tl.float32)
        for begin in tl.range(0, F, BK, num_stages=STAGES):
            feature = (begin + piece)[:, None, :]
            mask = (row < rows)[None, :, None] & (feature < F)
            value = tl.load(x + row[None, :, None] * F + feature, mask=mask, other=0.0)
            feature = (begin + piece)[:, :, None]
            mask = (output < OUT)[None, None, :] & (feature < F)
            source = weight + output.to(tl.int64)[None, None, :] * F + feature
            total = product(value, tl.load(source, mask=mask, other=0.0), total)
            if SWIGLU:
                right = product(value, tl.load(source + OUT * F, mask=mask, other=0.0), right)
            if NORM:
                squares = product(value, tl.permute(value, (0, 2, 1)), squares)
        total = _over_warps(total)
        if SWIGLU:
            right = _over_warps(right)
        if NORM:
            diagonal = (row[:, None] == row[None, :])[None, :, :]
            square = tl.sum(tl.sum(tl.where(diagonal, squares, 0.0), 2), 0)
            factor = 1.0 / tl.sqrt(square / F + eps)
            total *= factor[:, None]
            if SWIGLU:
                right *= factor[:, None]
        if SWIGLU:
            total = total * tl.sigmoid(total) * right
        target = row[:, None] * OUT + output[None, :]
        mask = (row < rows)[:, None] & (output < OUT)[None, :]
        if ADD:
            total += tl.load(y + target, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + target, total.to(y.dtype.element_ty), mask=mask)
    else:
        if P > 0:
            part = block - BLOCKS
            own = (part // PARTS).to(tl.int64)
            _small_product(x, norm_weight, small_weight, small, own, part % PARTS, eps, F, P, NORM, BF, BP, PDL)


@triton.jit(do_not_specialize=["eps"])
def decode_prepare_kernel(
    x, norm_weight, small_weight, result, small, eps,
    F: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """f(x) of one row, or a block of its small product."""
    PROGRAMS: tl.constexpr = 1 + (P + BP - 1) // BP
    pid = tl.program_id(0)
    row = (pid // PROGRAMS).to(tl.int64)
    if pid % PROGRAMS == 0:
        feature = tl.arange(0, BF)
        value = _whole_row(x, norm_weight, row, eps, F, BF, NORM)
        tl.store(result + row * F + feature, value.to(result.dtype.element_ty), mask=feature < F)
    else:
        if P > 0:
            _small_product(x, norm_weight, small_weight, small, row, pid % PROGRAMS - 1, eps, F, P, NORM, BF, BP, False)


@triton.jit(do_not_specialize=["total"])
def decode_swiglu_kernel(x, y, total, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """``y`` ``[N, OUT]`` from ``x`` ``[N, 2 OUT]``: the product of its halves, the left one through SiLU."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = x + index // OUT * (2 * OUT) + index % OUT
    left = tl.load(source, mask=index < total, other=0.0).to(tl.float32)
    right = tl.load(source + OUT, mask=index < total, other=0.0).to(tl.float32)
    tl.store(y + index, (left * tl.sigmoid(left) * right).to(y.dtype.element_ty), mask=index < total)
