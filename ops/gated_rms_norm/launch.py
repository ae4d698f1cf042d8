"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, pointer, variant
from .kernels import gated_rms_norm_bwd_kernel, gated_rms_norm_fwd_kernel

MAX_PARTIALS = 512
"""Programs of the backward: a few for each multiprocessor, whatever the rows. Fixed, so that sums do not depend on
the device."""


def _config(features: int) -> Config:
    block_v = next_power_of_2(max(features, 16))
    constants = {"V": features, "BLOCK_R": max(2048 // block_v, 1), "BLOCK_V": block_v}
    return Config(constants, num_warps=4 if block_v <= 4096 else 8)


def gated_rms_norm_fwd(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    config = _config(x.shape[-1])
    rows = x.numel() // max(x.shape[-1], 1)
    grid = (cdiv(rows, config.constants["BLOCK_R"]),)
    launch(gated_rms_norm_fwd_kernel, grid, config, x, gate, weight, y, eps, rows)
    return y


def gated_rms_norm_bwd(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    config = _config(x.shape[-1])
    rows = x.numel() // max(x.shape[-1], 1)
    partials = min(cdiv(rows, config.constants["BLOCK_R"]), MAX_PARTIALS)
    partial = torch.empty(partials, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(gated_rms_norm_bwd_kernel, (partials,), config, dy, x, gate, weight, dx, dgate, partial, eps, rows)
    return dx, dgate, partial.sum(0).to(weight.dtype)


def variants() -> Iterator[KernelVariant]:
    for features in (16, 32, 64, 100, 128, 256, 2048):
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            label, quick = f"V={features} {dtype}", features == 256 and dtype == KERNEL_DTYPES[1]
            tail = {"eps": "fp32", "rows": "i32"}
            arguments = {**dict.fromkeys(("x", "gate", "weight", "y"), kind), **tail}
            yield variant(label, gated_rms_norm_fwd_kernel, arguments, _config(features), quick)
            arguments = dict.fromkeys(("dy", "x", "gate", "weight", "dx", "dgate"), kind)
            arguments |= {"partial": "*fp32", **tail}
            yield variant(label, gated_rms_norm_bwd_kernel, arguments, _config(features), quick)
