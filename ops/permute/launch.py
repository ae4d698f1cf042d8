"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, feature_block, launch, pointer, variant
from .kernels import to_rows_kernel, to_tokens_kernel

TILE = 4096
"""Elements that one program copies; half of it where it reads many rows for each."""


def config(features: int, choices: int, topk: int) -> Config:
    block_f = feature_block(features, 1024)
    block_r = (TILE if choices <= 4 else TILE // 2) // block_f
    return Config({"F": features, "CHOICES": choices, "TOPK": topk, "BLOCK_R": block_r, "BLOCK_F": block_f})


def programs(rows: int, features: int, config: Config) -> int:
    """Feature blocks are neighbours in the grid: they share the tables of their rows."""
    return cdiv(rows, config.constants["BLOCK_R"]) * cdiv(features, config.constants["BLOCK_F"])


def permute_fwd(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    tokens, features, rows = x.shape[0], x.shape[1], entry_of.shape[0]
    out = x.new_empty(rows, features)
    chosen = config(features, max(slot_of.shape[1], 1), 0)
    launch(to_rows_kernel, (programs(rows, features, chosen),), chosen, x, None, entry_of, out, tokens, rows)
    return out


def permute_bwd(drows: Tensor, slot_of: Tensor) -> Tensor:
    tokens, features, rows = slot_of.shape[0], drows.shape[1], drows.shape[0]
    dx = drows.new_empty(tokens, features)
    chosen = config(features, slot_of.shape[1], 0)
    launch(to_tokens_kernel, (programs(tokens, features, chosen),), chosen, drows, None, slot_of, dx, tokens, rows)
    return dx


def row_variants(features: int, choices: int, topk: int, quick: bool) -> Iterator[KernelVariant]:
    """Both kernels in every dtype."""
    for dtype in KERNEL_DTYPES:
        kind, weights = pointer(dtype), "*fp32" if topk else None
        label = f"F={features} choices={choices} k={topk} {dtype}"
        fast = quick and dtype == KERNEL_DTYPES[1]
        sizes = {"out": kind, "tokens": "i32", "rows": "i32"}
        chosen = config(features, choices, topk)
        arguments = {"x": kind, "weights": weights, "entry_of": "*i32", **sizes}
        yield variant(label, to_rows_kernel, arguments, chosen, fast)
        arguments = {"o": kind, "weights": weights, "slot_of": "*i32", **sizes}
        yield variant(label, to_tokens_kernel, arguments, chosen, fast)


def variants() -> Iterator[KernelVariant]:
    for features in (16, 48, 1280, 2048):
        yield from row_variants(features, 3, 0, quick=features == 1280)
