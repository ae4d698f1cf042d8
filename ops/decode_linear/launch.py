"""Launches of the Triton kernels, and the configurations that they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, overlapped, pointer, variant
from . import cpu
from .kernels import decode_prepare_kernel, decode_row_kernel, decode_swiglu_kernel, decode_tile_kernel

MOST_ROWS = 4
"""Up to it a program takes one row and whole rows of the weight, in float32."""
FEW_ROWS = 1
"""The same in 16 bits."""
TILE_ROWS = (16, 32)
"""Rows that one program of the tile kernel takes: the smaller where all fit into it."""
MOST_TILE_ROWS = max(TILE_ROWS)
"""Up to it a program takes all rows; above it the matrix product of torch takes over."""
MOST_FEATURES = 16384
PROGRAMS = 256
"""What a launch should at least have to keep the multiprocessors of a large GPU busy."""
TILE_PROGRAMS = 60
"""The same for the tile kernel, whose programs have more in flight."""
OVERLAPPED = 256
"""Programs of a launch of tiles that overlaps the kernel before it. More of them, some of which would wait for a place,
are faster behind it."""
PARALLEL = 4
"""Warps of the tile kernel, each with a piece of the features."""
MEASURED = {
    (16, 1024, 12288, False): (32, 256, 4),
    (16, 1024, 1024, False): (16, 256, 5),
    (16, 1024, 2048, True): (16, 256, 5),
    (16, 2048, 1024, False): (16, 256, 7),
    (16, 1024, 32000, False): (32, 256, 4),
    (32, 1024, 12288, False): (32, 256, 3),
    (32, 1024, 1024, False): (16, 256, 5),
    (32, 1024, 2048, True): (16, 256, 4),
    (32, 2048, 1024, False): (16, 256, 5),
    (32, 1024, 32000, False): (32, 256, 3),
}
"""(BR, F, outputs, swiglu) -> (BO, BK, stages), the fastest of a few on an H200 with Triton 3.6 that fit into shared
memory on every GPU."""
SWIGLU_BLOCK = 1024


def _constants(features: int, small: int, norm: bool) -> dict[str, Any]:
    wide = next_power_of_2(max(features, 16))
    return {"F": features, "P": small, "NORM": norm, "BF": wide, "BP": max(min(4096 // wide, 4), 1)}


def _row_config(
    features: int, outputs: int, small: int, norm: bool, swiglu: bool, add: bool, dtype: torch.dtype
) -> Config:
    constants = _constants(features, small, norm)
    # A program holds whole rows of the weight in registers.
    block = max(min(16384 // constants["BF"] // (2 if dtype == torch.float32 else 1) // (1 + swiglu), 16), 1)
    while block > 1 and cdiv(outputs, block) < PROGRAMS:
        block //= 2
    warps = 8 if block * (1 + swiglu) * constants["BF"] >= 4096 else 4
    constants |= {"OUT": outputs, "BO": block, "SWIGLU": swiglu, "ADD": add}
    return Config(constants, num_warps=warps, overlap=True)


def _tile_config(rows: int, features: int, outputs: int, small: int, norm: bool, swiglu: bool, add: bool) -> Config:
    constants = _constants(features, small, norm)
    block_rows = next(size for size in TILE_ROWS if rows <= size)
    block = 64
    while block > 8 and cdiv(outputs, block) < TILE_PROGRAMS:
        block //= 2
    depth = min(max(next_power_of_2(features), 16 * PARALLEL), 8192 // (block * (1 + swiglu)), 256)
    block, depth, stages = MEASURED.get((block_rows, features, outputs, swiglu), (block, depth, 4))
    constants |= {"BR": block_rows, "BO": block, "BK": depth, "STAGES": stages, "PARALLEL": PARALLEL}
    constants |= {"OUT": outputs, "SWIGLU": swiglu, "ADD": add}
    return Config(constants, num_warps=PARALLEL, overlap=not small and cdiv(outputs, block) <= OVERLAPPED)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    small_weight: Tensor | None,
    norm: bool,
    swiglu: bool,
    eps: float,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as ``mom::decode_linear``; with ``y`` the product is added to it in place."""
    rows, features = x.shape
    outputs = weight.shape[0] // (1 + swiglu)
    if not 0 < features <= MOST_FEATURES:
        return cpu.decode_linear(x, weight, norm_weight, small_weight, norm, swiglu, eps, y)
    x, weight = x.contiguous(), weight.contiguous()
    norm_weight, small_weight = (None if t is None else t.contiguous() for t in (norm_weight, small_weight))
    small_outputs = 0 if small_weight is None else small_weight.shape[0]
    add = y is not None
    # float32 would need tensor cores in several passes.
    narrow = x.dtype != torch.float32
    if rows <= (FEW_ROWS if narrow else MOST_ROWS):
        small = _small_outputs(x, small_weight)
        config = _row_config(features, outputs, small_outputs, norm, swiglu, add, x.dtype)
        y = x.new_empty(rows, outputs) if y is None else y
        programs = cdiv(outputs, config.constants["BO"]) + cdiv(small_outputs, config.constants["BP"])
        launch(decode_row_kernel, (rows * programs,), config, x, weight, norm_weight, small_weight, y, small, eps)
        return y, small
    tiles = rows <= MOST_TILE_ROWS and narrow
    if norm_weight is not None or not tiles and (norm or small_weight is not None):
        x, small = prepare(x, norm_weight, small_weight, norm, eps)
        norm, small_weight, small_outputs = False, None, 0
    else:
        small = _small_outputs(x, small_weight)
    if tiles:
        config = _tile_config(rows, features, outputs, small_outputs, norm, swiglu, add)
        y = x.new_empty(rows, outputs) if y is None else y
        programs = cdiv(outputs, config.constants["BO"]) + rows * cdiv(small_outputs, config.constants["BP"])
        launch(decode_tile_kernel, (programs,), config, x, weight, None, small_weight, y, small, rows, eps)
        return y, small
    y = cpu.product(x, weight, y, False)
    return combine_halves(y) if swiglu else y, small


def _small_outputs(x: Tensor, small_weight: Tensor | None) -> Tensor:
    return x.new_empty(0) if small_weight is None else small_weight.new_empty(x.shape[0], small_weight.shape[0])


def prepare(
    x: Tensor, norm_weight: Tensor | None, small_weight: Tensor | None, norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The normalised rows ``[B, F]`` and their product with ``small_weight`` ``[P, F]`` in float32, or ``[0]``."""
    rows, features = x.shape
    small_outputs = 0 if small_weight is None else small_weight.shape[0]
    value, small = torch.empty_like(x), _small_outputs(x, small_weight)
    config = Config(_constants(features, small_outputs, norm))
    programs = rows * (1 + cdiv(small_outputs, config.constants["BP"]))
    launch(decode_prepare_kernel, (programs,), config, x, norm_weight, small_weight, value, small, eps)
    return value, small


def combine_halves(x: Tensor) -> Tensor:
    """``SiLU(left) * right`` of rows ``[B, 2 O]``."""
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    launch(decode_swiglu_kernel, (cdiv(y.numel(), SWIGLU_BLOCK),), _swiglu_config(y.shape[1]), x, y, y.numel())
    return y


def _swiglu_config(outputs: int) -> Config:
    return Config({"OUT": outputs, "BLOCK": SWIGLU_BLOCK})


def _arguments(kernel: Any, dtype: torch.dtype, norm: bool, small: bool) -> dict[str, str | None]:
    kind = pointer(dtype)
    arguments: dict[str, str | None] = dict.fromkeys(("x", "weight", "y", "result"), kind)
    arguments |= {
        "norm_weight": kind if norm else None,
        "small_weight": "*fp32" if small else None,
        "small": "*fp32" if small else kind,
        "rows": "i32",
        "total": "i32",
        "eps": "fp32",
    }
    return {name: kind for name, kind in arguments.items() if name in kernel.arg_names}


def variants() -> Iterator[KernelVariant]:
    """The layers of a decode step over widths and dtypes."""
    for dtype in KERNEL_DTYPES:
        for width in (64, 320, 1024, 2048):
            cases = [  # outputs, norm, swiglu, add, small outputs
                (4 * width, True, False, False, 44),
                (2 * width, True, True, False, 0),
                (width, False, False, True, 0),
                (32000, True, False, False, 0),
            ]
            for outputs, norm, swiglu, add, small in cases:
                label = f"F={width} OUT={outputs} {dtype}" + " swiglu" * swiglu + " norm" * norm + " add" * add
                quick = width == 1024 and dtype == torch.bfloat16
                weight = outputs == 32000
                config = _row_config(width, outputs, small, norm, swiglu, add, dtype)
                arguments = _arguments(decode_row_kernel, dtype, weight, small > 0)
                known = variant(label, decode_row_kernel, arguments, config, quick)
                yield known
                if quick:
                    yield overlapped(known)
                if dtype != torch.float32:
                    for rows in TILE_ROWS:
                        yield from _tile_variants(rows, width, outputs, small, norm and not weight, swiglu, add, dtype)
                if norm:
                    config = Config(_constants(width, small, norm))
                    arguments = _arguments(decode_prepare_kernel, dtype, weight, small > 0)
                    yield variant(label, decode_prepare_kernel, arguments, config, quick and small > 0)
            arguments = _arguments(decode_swiglu_kernel, dtype, False, False)
            yield variant(f"OUT={width} {dtype}", decode_swiglu_kernel, arguments, _swiglu_config(width), width == 1024)
    for rows, features, outputs, swiglu in MEASURED:
        if features == 2048 or outputs == 12288:  # the others are among those above
            small = 44 if outputs == 12288 else 0
            yield from _tile_variants(rows, features, outputs, small, small > 0, swiglu, not small, torch.bfloat16)


def _tile_variants(
    rows: int, features: int, outputs: int, small: int, norm: bool, swiglu: bool, add: bool, dtype: torch.dtype
) -> Iterator[KernelVariant]:
    config = _tile_config(rows, features, outputs, small, norm, swiglu, add)
    label = f"rows={rows} F={features} OUT={outputs} {dtype}" + " swiglu" * swiglu + " norm" * norm + " add" * add
    quick = dtype == torch.bfloat16 and (features == 1024 or outputs == 1024)
    arguments = _arguments(decode_tile_kernel, dtype, False, small > 0)
    known = variant(label, decode_tile_kernel, arguments, config, quick)
    yield known
    if quick and config.overlap:
        yield overlapped(known)
