"""Kernels of operators in the argument order of TensorRT's ahead-of-time plugins: inputs, whole numbers, outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops.gated_rms_norm.kernels import gated_rms_norm_fwd_kernel
from ..ops.route.kernels import route_fwd_kernel


@triton.jit
def gated_rms_norm_plugin_kernel(
    x, gate, weight, rows, y, EPS: tl.constexpr, V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    gated_rms_norm_fwd_kernel(x, gate, weight, y, EPS, rows, V, BLOCK_R, BLOCK_V)


@triton.jit
def route_plugin_kernel(
    logits, tokens, weights, indices,
    M: tl.constexpr, TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    route_fwd_kernel(logits, weights, indices, tokens, M, TOPK, BLOCK_T, BLOCK_M, BLOCK_K)
