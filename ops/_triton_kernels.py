"""What kernels of several operators call."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)

helper = (lambda function: function) if INTERPRET else triton.jit
"""The interpreter rewrites a @triton.jit function at every call from another, which a plain one is spared."""


@helper
def after_previous():
    """Wait until the kernel before this one is done, then let the next one start (programmatic dependent launch).

    Every program calls it before it reads or writes what another kernel writes or reads. The next kernel may start once
    all programs have passed, so that at most two kernels overlap, and what it does before its own call sees everything
    but this one's results.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@helper
def product(a, b, total):
    """``total + a b`` for tiles of one dtype; the interpreter multiplies the bits of bfloat16 tiles as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@helper
def sigmoid(x):
    """``1 / (1 + exp(-x))`` of float32: relative error below 2^-20, results below 2^-126 are zero.

    Four instructions; Triton's own takes eleven, most of them for numbers near the ends of float32.
    """
    if INTERPRETED:
        return tl.sigmoid(x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
            "add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@helper
def exp(x):
    """``exp(x)`` of float32 as Triton's own, but that results below 2^-126 are zero: two instructions for five."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@helper
def softplus(x):
    """``log(1 + exp(x))``."""
    small = tl.exp(tl.minimum(x, 20.0))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    # The fast logarithm is only absolutely accurate near 1.
    series = 2.0 * ratio * (1.0 + square * (1.0 / 3.0 + square * (0.2 + square * (1.0 / 7.0 + square / 9.0))))
    return tl.where(x > 20.0, x, tl.where(small < 0.25, series, tl.log(1.0 + small)))
