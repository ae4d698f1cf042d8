"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, pointer, variant
from .kernels import small_linear_dweight_kernel, small_linear_dx_kernel, small_linear_fwd_kernel

MAX_PARTS = 32
"""Parts of the tokens that the weight's gradient is summed over: fixed, so that sums do not depend on the device."""


def _config(outputs: int, inner: int, block_t: int, block_d: int, stages: int = 1) -> Config:
    block_n, block_d = (min(next_power_of_2(max(size, 16)), limit) for size, limit in ((outputs, 64), (inner, block_d)))
    constants = {"N": outputs, "D": inner, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return Config(constants, num_stages=stages)


def _fwd_config(outputs: int, inner: int, dtype: torch.dtype) -> Config:
    return _config(outputs, inner, 32, 128, 3) if dtype.itemsize == 2 else _config(outputs, inner, 32, 32)


def _dx_config(outputs: int, inner: int, dtype: torch.dtype) -> Config:
    return _config(outputs, inner, 32, 128 if dtype == torch.bfloat16 else 64)


def _dweight_config(outputs: int, inner: int, dtype: torch.dtype) -> Config:
    return _config(outputs, inner, 64, 32, 3) if dtype == torch.bfloat16 else _config(outputs, inner, 32, 32)


def _blocks(outputs: int, config: Config) -> int:
    return cdiv(outputs, config.constants["BLOCK_N"])


def small_linear_fwd(x: Tensor, weight: Tensor) -> Tensor:
    (tokens, inner), outputs = x.shape, weight.shape[0]
    y = x.new_empty(tokens, outputs, dtype=torch.float32)
    if y.numel() == 0:
        return y
    config = _fwd_config(outputs, inner, x.dtype)
    grid = (cdiv(tokens, config.constants["BLOCK_T"]) * _blocks(outputs, config),)
    launch(small_linear_fwd_kernel, grid, config, x, weight, y, tokens)
    return y


def small_linear_bwd(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, inner), outputs = x.shape, weight.shape[0]
    dx = torch.empty_like(x)
    if x.numel() == 0 or outputs == 0:
        return dx.zero_(), torch.zeros_like(weight)
    config = _dx_config(outputs, inner, x.dtype)
    columns = cdiv(inner, config.constants["BLOCK_D"])
    grid = (cdiv(tokens, config.constants["BLOCK_T"]) * columns,)
    launch(small_linear_dx_kernel, grid, config, dy, weight, dx, tokens)
    config = _dweight_config(outputs, inner, x.dtype)
    step, tiles = config.constants["BLOCK_T"], cdiv(inner, config.constants["BLOCK_D"]) * _blocks(outputs, config)
    span = cdiv(cdiv(tokens, MAX_PARTS), step) * step
    parts = cdiv(tokens, span)
    partial = torch.empty(parts, outputs, inner, dtype=torch.float32, device=x.device)
    launch(small_linear_dweight_kernel, (parts * tiles,), config, dy, x, partial, tokens, span)
    return dx, partial.sum(0).to(weight.dtype)


def variants() -> Iterator[KernelVariant]:
    for outputs, inner in ((44, 1024), (3, 16), (136, 2048), (20, 100)):
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            label, quick = f"n={outputs} D={inner} {dtype}", outputs == 44 and dtype == torch.bfloat16
            arguments: dict[str, str | None] = {"x": kind, "weight": kind, "y": "*fp32", "tokens": "i32"}
            yield variant(label, small_linear_fwd_kernel, arguments, _fwd_config(outputs, inner, dtype), quick)
            arguments = {"dy": "*fp32", "weight": kind, "dx": kind, "tokens": "i32"}
            yield variant(label, small_linear_dx_kernel, arguments, _dx_config(outputs, inner, dtype), quick)
            arguments = {"dy": "*fp32", "x": kind, "partial": "*fp32", "tokens": "i32", "span": "i32"}
            yield variant(label, small_linear_dweight_kernel, arguments, _dweight_config(outputs, inner, dtype), quick)
