"""Triton kernels of the linear layer of a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import INTERPRET

helper = (lambda function: function) if INTERPRET else triton.jit
"""The interpreter rewrites a @triton.jit function at every call from another, which a plain one is spared."""

PLAIN, RMS_NORM, GATED_RMS_NORM, SWIGLU = (tl.constexpr(code) for code in range(4))


@helper
def _whole_row(
    x, norm_weight, gate, row, gate_stride, eps, INPUT: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr
):
    """f(x) of one row ``[BF]``, rounded to the dtype of x, as float32. A norm by head needs powers of two."""
    feature = tl.arange(0, BF)
    mask = feature < F
    source = x + row * (F * (2 if INPUT == SWIGLU else 1)) + feature
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if INPUT == SWIGLU:
        value = value * tl.sigmoid(value) * tl.load(source + F, mask=mask, other=0.0).to(tl.float32)
    if INPUT == RMS_NORM:
        factor = tl.load(norm_weight + feature, mask=mask, other=0.0).to(tl.float32)
        value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / F + eps)) * factor
    if INPUT == GATED_RMS_NORM:
        heads = tl.reshape(value, [BF // V, V])
        heads = heads * (1.0 / tl.sqrt(tl.sum(heads * heads, 1) / V + eps))[:, None]
        factor = tl.load(norm_weight + feature % V, mask=mask, other=0.0).to(tl.float32)
        value = tl.reshape(heads, [BF]) * factor
        if gate is not None:
            gating = tl.load(gate + row * gate_stride + feature, mask=mask, other=0.0).to(tl.float32)
            value = value * gating * tl.sigmoid(gating)
    return value.to(x.dtype.element_ty).to(tl.float32)


@helper
def _small_product(
    x, norm_weight, gate, small_weight, small, row, block, gate_stride, eps,
    INPUT: tl.constexpr, F: tl.constexpr, P: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One row and a block of the small product."""
    output = block * BP + tl.arange(0, BP)
    feature = tl.arange(0, BF)
    mask = (output < P)[:, None] & (feature < F)[None, :]
    tile = tl.load(small_weight + output[:, None] * F + feature[None, :], mask=mask, other=0.0)
    value = _whole_row(x, norm_weight, gate, row, gate_stride, eps, INPUT, F, V, BF)
    tl.store(small + row * P + output, tl.sum(tile * value[None, :], 1), mask=output < P)


@triton.jit(do_not_specialize=["gate_stride", "eps"])
def decode_row_kernel(
    x, weight, norm_weight, gate, small_weight, y, small, gate_stride, eps,
    F: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, INPUT: tl.constexpr, V: tl.constexpr, BF: tl.constexpr,
    BO: tl.constexpr, BP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row and a block of outputs: first of ``weight`` (added to y where ADD), then of the small one."""
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
        # The weights first: they are on their way while the row is prepared.
        tile = tl.load(weight + output.to(tl.int64)[:, None] * F + feature[None, :], mask=mask, other=0.0)
        value = _whole_row(x, norm_weight, gate, row, gate_stride, eps, INPUT, F, V, BF)
        total = tl.sum(tile.to(tl.float32) * value[None, :], 1)
        target = row * OUT + output
        if ADD:
            total += tl.load(y + target, mask=output < OUT, other=0.0).to(tl.float32)
        tl.store(y + target, total.to(y.dtype.element_ty), mask=output < OUT)
    else:
        if P > 0:
            _small_product(
                x, norm_weight, gate, small_weight, small, row, block - BLOCKS, gate_stride, eps,
                INPUT, F, P, V, BF, BP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["gate_stride", "eps"])
def decode_prepare_kernel(
    x, norm_weight, gate, small_weight, result, small, gate_stride, eps,
    F: tl.constexpr, P: tl.constexpr, INPUT: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """f(x) of one row, or a block of its small product."""
    PROGRAMS: tl.constexpr = 1 + (P + BP - 1) // BP
    pid = tl.program_id(0)
    row = (pid // PROGRAMS).to(tl.int64)
    if pid % PROGRAMS == 0:
        feature = tl.arange(0, BF)
        value = _whole_row(x, norm_weight, gate, row, gate_stride, eps, INPUT, F, V, BF)
        tl.store(result + row * F + feature, value.to(result.dtype.element_ty), mask=feature < F)
    else:
        if P > 0:
            _small_product(
                x, norm_weight, gate, small_weight, small, row, pid % PROGRAMS - 1, gate_stride, eps,
                INPUT, F, P, V, BF, BP,
            )  # fmt: skip
