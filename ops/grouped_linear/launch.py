"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .._kernel_variant import KernelVariant
from .._launch import (
    KERNEL_DTYPES,
    Config,
    aligned,
    capability,
    cdiv,
    launch,
    next_power_of_2,
    pointer,
    variant,
)
from .._layout import CHUNK
from .._triton import on_gpu
from .kernels import ends_kernel, grouped_linear_dweight_kernel, grouped_linear_fwd_kernel, zero_tail_kernel

# Both operands of the products are plain loads: Triton 3.6 puts no proxy fence before such a product in a pipelined
# loop on sm_90, so the loops have one stage.


def _block(size: int, limit: int) -> int:
    return min(next_power_of_2(max(size, 16)), limit)


def _fwd_config(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Config:
    """``shape`` and ``strides`` of the weight: constants of a model, as is its transposed view in the backward."""
    groups, columns, inner = shape
    wide = dtype == torch.float32
    constants = {
        "G": groups,
        "N": columns,
        "D": inner,
        "STRIDE_G": strides[0],
        "STRIDE_N": strides[1],
        "STRIDE_D": strides[2],
        "BLOCK_G": next_power_of_2(max(groups, 2)),
        "BLOCK_R": CHUNK,
        "BLOCK_N": _block(columns, 64 if wide else 128),
        "BLOCK_D": _block(inner, 32 if wide else 64),
    }
    return Config(constants)


def _dweight_config(columns: int, inner: int, dtype: torch.dtype) -> Config:
    wide = dtype == torch.float32
    constants = {
        "N": columns,
        "D": inner,
        "BLOCK_R": 32 if wide else 64,
        "BLOCK_N": _block(columns, 64),
        "BLOCK_D": _block(inner, 64 if wide else 128),
    }
    return Config(constants)


def _tail_config(groups: int, columns: int) -> Config:
    return Config({"G": groups, "N": columns, "BLOCK_R": 16, "BLOCK_N": _block(columns, 256)})


def _ends_config(groups: int) -> Config:
    return Config({"G": groups, "BLOCK_G": next_power_of_2(max(groups, 2))}, num_warps=1)


def _use_library(x: Tensor, *others: Tensor) -> bool:
    """Whether torch's grouped_mm serves: it keeps the offsets on the device on sm_90 alone, in bfloat16, with rows of
    whole 16-byte units; elsewhere it copies them to the host."""
    if not on_gpu(x) or x.dtype != torch.bfloat16 or 0 in x.shape or not hasattr(functional, "grouped_mm"):
        return False
    if capability(x.device) != (9, 0):
        return False
    for tensor in (x, *others):
        rest = [stride for stride in tensor.stride() if stride != 1]
        if not aligned(tensor) or any(stride * tensor.element_size() % 16 for stride in rest) or 0 in tensor.shape:
            return False
    return True


def _ends(group_offset: Tensor, rows: int) -> Tensor:
    """Where each group ends. A value of a table on a GPU is not checked by the host and must not lead outside."""
    ends = torch.empty_like(group_offset[1:])
    launch(ends_kernel, (1,), _ends_config(ends.shape[0]), group_offset, ends, rows)
    return ends


def grouped_linear_fwd(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    rows, (groups, columns, _) = x.shape[0], weight.shape
    if groups and columns % 8 == 0 and _use_library(x, weight):  # a ragged result would come with padded rows
        ends = _ends(group_offset, rows)
        y = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        config = _tail_config(groups, columns)
        launch(zero_tail_kernel, (cdiv(rows, config.constants["BLOCK_R"]),), config, y, ends, rows)
        return y
    return grouped_linear_own(x, weight, group_offset)


def grouped_linear_own(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    """The forward through our kernel, whatever the library offers."""
    rows, (groups, columns, _) = x.shape[0], weight.shape
    x, y = x.contiguous(), x.new_empty(rows, columns)
    if groups == 0:
        return y.zero_()
    config = _fwd_config(tuple(weight.shape), weight.stride(), x.dtype)
    grid = (cdiv(rows, config.constants["BLOCK_R"]) * cdiv(columns, config.constants["BLOCK_N"]),)
    launch(grouped_linear_fwd_kernel, grid, config, x, weight, group_offset, y, rows)
    return y


def grouped_linear_dweight(dy: Tensor, x: Tensor, group_offset: Tensor) -> Tensor:
    (rows, inner), columns, groups = x.shape, dy.shape[1], group_offset.shape[0] - 1
    if groups and _use_library(x, dy):
        return functional.grouped_mm(dy.t(), x, offs=_ends(group_offset, rows))
    dy, x, dweight = dy.contiguous(), x.contiguous(), x.new_empty(groups, columns, inner)
    config = _dweight_config(columns, inner, x.dtype)
    tiles = cdiv(columns, config.constants["BLOCK_N"]) * cdiv(inner, config.constants["BLOCK_D"])
    launch(grouped_linear_dweight_kernel, (groups * tiles,), config, dy, x, group_offset, dweight, rows)
    return dweight


def variants() -> Iterator[KernelVariant]:
    for groups, columns, inner in ((5, 1280, 1024), (5, 16, 16), (4, 100, 48), (17, 256, 2048), (1, 2048, 256)):
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            for transposed in (False, True):
                strides = (columns * inner, *((1, columns) if transposed else (inner, 1)))
                arguments = {"x": kind, "weight": kind, "group_offset": "*i32", "y": kind, "rows": "i32"}
                label = f"G={groups} N={columns} D={inner} transposed={transposed} {dtype}"
                quick = groups == 5 and inner == 1024 and dtype == KERNEL_DTYPES[1]
                config = _fwd_config((groups, columns, inner), strides, dtype)
                yield variant(label, grouped_linear_fwd_kernel, arguments, config, quick)
            arguments = {"dy": kind, "x": kind, "group_offset": "*i32", "dweight": kind, "rows": "i32"}
            label = f"G={groups} N={columns} D={inner} {dtype}"
            config = _dweight_config(columns, inner, dtype)
            quick = groups == 5 and inner == 1024 and dtype == KERNEL_DTYPES[1]
            yield variant(label, grouped_linear_dweight_kernel, arguments, config, quick)
    for groups in (5, 65):
        arguments = {"group_offset": "*i32", "ends": "*i32", "rows": "i32"}
        yield variant(f"G={groups}", ends_kernel, arguments, _ends_config(groups), groups == 5)
    for columns in (16, 100, 2048):
        config = _tail_config(5, columns)
        arguments = {"y": "*bf16", "ends": "*i32", "rows": "i32"}
        yield variant(f"N={columns}", zero_tail_kernel, arguments, config, columns == 2048)
