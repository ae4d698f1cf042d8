"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, feature_block, launch, next_power_of_2, pointer, variant
from .kernels import combine_norm_bwd_kernel, combine_norm_fwd_kernel, zero_pads_kernel

MAX_PARTIALS = 384
"""Programs of the backward: three for each multiprocessor of an H200, all that its registers hold at once. Fixed, so
that sums do not depend on the device."""


def _config(heads: int, features: int, choices: int, topk: int) -> Config:
    block_h, block_v = next_power_of_2(max(heads, 1)), next_power_of_2(max(features, 16))
    # Two tokens of 1024 values, where there are few choices: five 16-byte loads of each thread are under way at once.
    block_t = max((2048 if choices <= 4 else 1024) // (block_h * block_v), 1)
    constants = {"HV": heads, "V": features, "CHOICES": choices, "TOPK": topk}
    constants |= {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_V": block_v}
    return Config(constants, num_warps=min(max(block_t * block_h * block_v // 512, 4), 16))


def _pads_config(features: int) -> Config:
    return Config({"F": features, "BLOCK_R": 16, "BLOCK_F": feature_block(features, 256)})


def combine_norm_fwd(
    o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor, gate: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    rows, heads, features = o.shape
    tokens, choices = slot_of.shape
    y = torch.empty_like(gate)
    config = _config(heads, features, choices, weights.shape[1])
    grid = (cdiv(tokens, config.constants["BLOCK_T"]),)
    launch(combine_norm_fwd_kernel, grid, config, o, weights, slot_of, gate, norm_weight, y, eps, tokens, rows)
    return y


def combine_norm_bwd(
    dy: Tensor,
    o: Tensor,
    weights: Tensor,
    slot_of: Tensor,
    entry_of: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads, features = o.shape
    tokens, choices = slot_of.shape
    do, dweights, dgate = torch.empty_like(o), torch.empty_like(weights), torch.empty_like(gate)
    config = _pads_config(heads * features)
    launch(zero_pads_kernel, (cdiv(rows, config.constants["BLOCK_R"]),), config, do, entry_of, rows)
    config = _config(heads, features, choices, weights.shape[1])
    partials = min(cdiv(tokens, config.constants["BLOCK_T"]), MAX_PARTIALS)
    partial = torch.empty(partials, features, dtype=torch.float32, device=o.device)
    launch(
        combine_norm_bwd_kernel, (partials,), config, dy, o, weights, slot_of, gate, norm_weight, do, dweights, dgate,
        partial, eps, tokens, rows,
    )  # fmt: skip
    return do, dweights, dgate, partial.sum(0).to(norm_weight.dtype)


def variants() -> Iterator[KernelVariant]:
    shapes = ((4, 256, 3, 2), (2, 16, 3, 2), (6, 100, 1, 1), (16, 128, 9, 8), (8, 512, 2, 1))
    for heads, features, choices, topk in shapes:
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            label = f"HV={heads} V={features} choices={choices} k={topk} {dtype}"
            quick = features == 256 and dtype == torch.bfloat16
            inputs = {"o": kind, "weights": "*fp32", "slot_of": "*i32", "gate": kind, "norm_weight": kind}
            sizes = {"eps": "fp32", "tokens": "i32", "rows": "i32"}
            config = _config(heads, features, choices, topk)
            yield variant(label, combine_norm_fwd_kernel, {**inputs, "y": kind, **sizes}, config, quick)
            outputs = {"dy": kind, "do": kind, "dweights": "*fp32", "dgate": kind, "partial": "*fp32"}
            yield variant(label, combine_norm_bwd_kernel, {**inputs, **outputs, **sizes}, config, quick)
            arguments = {"out": kind, "entry_of": "*i32", "rows": "i32"}
            yield variant(label, zero_pads_kernel, arguments, _pads_config(heads * features), quick)
