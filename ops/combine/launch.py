"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, feature_block, launch, pointer, variant
from ..permute.kernels import to_rows_kernel, to_tokens_kernel
from ..permute.launch import config, programs, row_variants
from .kernels import dweights_kernel


def _dot_config(features: int, choices: int, topk: int) -> Config:
    block_f = feature_block(features, 512)
    constants = {"F": features, "CHOICES": choices, "TOPK": topk, "BLOCK_T": 4096 // block_f, "BLOCK_F": block_f}
    return Config(constants)


def combine_fwd(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    tokens, features, rows = slot_of.shape[0], o.shape[1] * o.shape[2], o.shape[0]
    y = o.new_empty(tokens, o.shape[1], o.shape[2])
    chosen = config(features, slot_of.shape[1], weights.shape[1])
    launch(to_tokens_kernel, (programs(tokens, features, chosen),), chosen, o, weights, slot_of, y, tokens, rows)
    return y


def combine_bwd(dy: Tensor, o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> tuple[Tensor, Tensor]:
    tokens, features, rows = slot_of.shape[0], o.shape[1] * o.shape[2], o.shape[0]
    choices, topk = slot_of.shape[1], weights.shape[1]
    do, dweights = torch.empty_like(o), torch.empty_like(weights)
    chosen = config(features, max(choices, 1), topk)
    launch(to_rows_kernel, (programs(rows, features, chosen),), chosen, dy, weights, entry_of, do, tokens, rows)
    chosen = _dot_config(features, choices, topk)
    grid = (cdiv(tokens, chosen.constants["BLOCK_T"]) * topk,)
    launch(dweights_kernel, grid, chosen, dy, o, slot_of, dweights, tokens, rows)
    return do, dweights


def variants() -> Iterator[KernelVariant]:
    for features, choices, topk in ((16, 3, 2), (256, 3, 2), (1280, 3, 2), (2048, 1, 1), (512, 9, 8)):
        quick = features == 1280
        yield from row_variants(features, choices, topk, quick)
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            arguments = {"dy": kind, "o": kind, "slot_of": "*i32", "dweights": "*fp32", "tokens": "i32", "rows": "i32"}
            label = f"F={features} choices={choices} k={topk} {dtype}"
            chosen = _dot_config(features, choices, topk)
            yield variant(label, dweights_kernel, arguments, chosen, quick and dtype == KERNEL_DTYPES[1])
