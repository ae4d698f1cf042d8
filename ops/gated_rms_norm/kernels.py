"""Triton kernels of the gated RMSNorm."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_fwd_kernel(
    x, gate, weight, y, eps, rows, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_V)
    mask = (row < rows)[:, None] & (column < V)[None, :]
    offset = row[:, None] * V + column[None, :]
    scale = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    gating = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / V + eps)
    result = value * rstd[:, None] * scale[None, :] * gating * tl.sigmoid(gating)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_bwd_kernel(
    dy,
    x,
    gate,
    weight,
    dx,
    dgate,
    partial,
    eps,
    rows,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Each program takes every num_programs-th block of rows; its sum for the weight goes to ``partial [P, V]``."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_V)
    scale = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for block in range(program, tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < V)[None, :]
        offset = row[:, None] * V + column[None, :]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        gating = tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / V + eps)
        normed = value * rstd[:, None]
        sigmoid = tl.sigmoid(gating)
        silu = gating * sigmoid
        dgated = grad * normed
        dgating = dgated * scale[None, :] * sigmoid * (1.0 + gating * (1.0 - sigmoid))
        tl.store(dgate + offset, dgating.to(dgate.dtype.element_ty), mask=mask)
        dweight += dgated * silu
        dnormed = grad * scale[None, :] * silu
        dvalue = rstd[:, None] * (dnormed - normed * (tl.sum(dnormed * normed, 1) / V)[:, None])
        tl.store(dx + offset, dvalue.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + program.to(tl.int64) * V + column, tl.sum(dweight, 0), mask=column < V)
