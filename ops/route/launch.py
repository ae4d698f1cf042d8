"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import Config, cdiv, launch, next_power_of_2, variant
from .kernels import route_bwd_kernel, route_fwd_kernel


def _config(memories: int, topk: int, backward: bool) -> Config:
    block_m = next_power_of_2(max(memories, 2))
    constants = {"M": memories, "TOPK": topk, "BLOCK_T": min(max(4096 // block_m, 1), 256), "BLOCK_M": block_m}
    if not backward:
        constants["BLOCK_K"] = next_power_of_2(max(topk, 2))
    return Config(constants)


def route_fwd(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    tokens, memories = logits.shape
    weights = logits.new_empty(tokens, topk)
    indices = logits.new_empty(tokens, topk, dtype=torch.int64)
    config = _config(memories, topk, False)
    grid = (cdiv(tokens, config.constants["BLOCK_T"]),)
    launch(route_fwd_kernel, grid, config, logits, weights, indices, tokens)
    return weights, indices


def route_bwd(dweights: Tensor, weights: Tensor, indices: Tensor, num_memories: int) -> Tensor:
    tokens, topk = weights.shape
    dlogits = weights.new_empty(tokens, num_memories)
    config = _config(num_memories, topk, True)
    grid = (cdiv(tokens, config.constants["BLOCK_T"]),)
    launch(route_bwd_kernel, grid, config, dweights, weights, indices, dlogits, tokens)
    return dlogits


def variants() -> Iterator[KernelVariant]:
    for memories, topk in ((4, 2), (2, 1), (8, 2), (16, 4), (64, 8)):
        label, quick = f"M={memories} k={topk}", memories == 4
        arguments = {"logits": "*fp32", "weights": "*fp32", "indices": "*i64", "tokens": "i32"}
        yield variant(label, route_fwd_kernel, arguments, _config(memories, topk, False), quick)
        arguments = {"dweights": "*fp32", "weights": "*fp32", "indices": "*i64", "dlogits": "*fp32", "tokens": "i32"}
        yield variant(label, route_bwd_kernel, arguments, _config(memories, topk, True), quick)
