"""Triton kernels of the top-k routing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def route_fwd_kernel(
    logits,
    weights,
    indices,
    tokens,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_M)
    choice = tl.arange(0, BLOCK_K)
    real = token < tokens
    free = real[:, None] & (column < M)[None, :]
    value = tl.load(logits + token[:, None] * M + column[None, :], mask=free, other=float("-inf"))
    key = tl.where(value == value, value, float("inf"))  # NaN is chosen first, as a sort does
    chosen = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    for j in range(TOPK):
        best = tl.max(tl.where(free, key, float("-inf")), 1)
        # The lowest free index with the best value; a free column is left in every round because TOPK <= M.
        index = tl.min(tl.where(free & (key == best[:, None]), column[None, :], BLOCK_M), 1)
        hit = column[None, :] == index[:, None]
        picked = tl.sum(tl.where(hit, value, 0.0), 1)
        chosen = tl.where(choice[None, :] == j, picked[:, None], chosen)
        tl.store(indices + token * TOPK + j, index.to(tl.int64), mask=real)
        free = free & ~hit
    top = tl.max(chosen, 1)
    share = tl.where((choice < TOPK)[None, :], tl.exp(chosen - top[:, None]), 0.0)
    share = share / tl.sum(share, 1)[:, None]
    mask = real[:, None] & (choice < TOPK)[None, :]
    tl.store(weights + token[:, None] * TOPK + choice[None, :], share, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def route_bwd_kernel(
    dweights,
    weights,
    indices,
    dlogits,
    tokens,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_M)
    real = token < tokens
    mean = tl.zeros([BLOCK_T], tl.float32)
    for j in range(TOPK):
        weight = tl.load(weights + token * TOPK + j, mask=real, other=0.0)
        mean += weight * tl.load(dweights + token * TOPK + j, mask=real, other=0.0)
    grad = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for j in range(TOPK):
        weight = tl.load(weights + token * TOPK + j, mask=real, other=0.0)
        dweight = tl.load(dweights + token * TOPK + j, mask=real, other=0.0)
        index = tl.load(indices + token * TOPK + j, mask=real, other=-1)
        grad = tl.where(column[None, :] == index[:, None], (weight * (dweight - mean))[:, None], grad)
    mask = real[:, None] & (column < M)[None, :]
    tl.store(dlogits + token[:, None] * M + column[None, :], grad, mask=mask)
