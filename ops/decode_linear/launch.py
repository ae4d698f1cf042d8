"""Launches of the Triton kernels, and the configurations that they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import Config, cdiv, launch, next_power_of_2, pointer, variant
from .._triton import INTERPRET
from . import cpu
from .kernels import decode_prepare_kernel, decode_row_kernel, decode_rows_kernel

CODES = {"plain": 0, "rms_norm": 1, "gated_rms_norm": 2, "swiglu": 3}
MOST_ROWS = 32
"""Above it the matrix product of torch takes over."""
MOST_FEATURES = 16384
PROGRAMS = 256
"""What a launch should at least have to keep the multiprocessors of a large GPU busy."""


def _row_constants(features: int, input: str, head: int) -> dict[str, Any]:
    # Without a norm by head V is not used; one value keeps the compiled kernels few.
    head = head if input == "gated_rms_norm" else 1
    return {"F": features, "INPUT": CODES[input], "V": head, "BF": next_power_of_2(max(features, 16))}


def _block(features: int, outputs: int, limit: int) -> int:
    """Outputs of a program that takes whole rows of the weight: what its registers hold, and enough programs."""
    block = max(min(16384 // features, limit), 1)
    while block > 1 and cdiv(outputs, block) < PROGRAMS:
        block //= 2
    return block


def _row_config(features: int, outputs: int, small: int, input: str, head: int, dtype: torch.dtype) -> Config:
    constants = _row_constants(features, input, head)
    size = constants["BF"] * (2 if dtype == torch.float32 else 1)
    block = _block(size, outputs, 16)
    constants |= {"OUT": outputs, "P": small, "BO": block, "BP": max(min(4096 // constants["BF"], 4), 1)}
    return Config(constants | {"BLOCKS": cdiv(outputs, block)})


def _rows_config(features: int, outputs: int, small: int, input: str, head: int, rows: int) -> Config:
    constants = _row_constants(features, input, head)
    block = 32 if cdiv(outputs, 32) >= PROGRAMS // 2 else 16
    constants |= {"OUT": outputs, "P": small, "BO": block, "BP": max(min(4096 // constants["BF"], 4), 1)}
    constants |= {"BLOCKS": cdiv(outputs, block), "BR": 16 if rows <= 16 else 32}
    constants["BC"] = head if input == "gated_rms_norm" else min(constants["BF"], 128)
    constants |= {"STAGES": 4 if constants["BC"] <= 128 else 3, "INTERPRET": INTERPRET}
    return Config(constants)


def _fits(features: int, input: str, head: int) -> bool:
    if input == "gated_rms_norm" and (head < 16 or head & (head - 1) or features & (features - 1)):
        return False
    return 0 < features <= MOST_FEATURES


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows, (outputs, features) = x.shape[0], weight.shape
    head = 1 if norm_weight is None else norm_weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    if not _fits(features, input, head):
        return cpu.decode_linear(x, weight, norm_weight, gate, residual, small_weight, input, eps)
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    gate_stride = 0 if gate is None else gate.stride(0)
    norm_weight, residual, small_weight = (
        None if t is None else t.contiguous() for t in (norm_weight, residual, small_weight)
    )
    small_outputs = 0 if small_weight is None else small_weight.shape[0]
    small = x.new_empty(0) if small_weight is None else small_weight.new_empty(rows, small_outputs)
    single = rows == 1 or (x.dtype == torch.float32 and rows <= 4)
    if not single and (rows > MOST_ROWS or x.dtype == torch.float32):
        value = x
        if input != "plain":
            value = x.new_empty(rows, features)
            prepare = Config(_row_constants(features, input, head))
            launch(decode_prepare_kernel, (rows,), prepare, x, norm_weight, gate, value, gate_stride, eps)
        y, _ = cpu.products(value, weight, residual, None)
        if small_weight is not None:
            # One row a program: the same bits whatever the batch, so that routing does not depend on it.
            config = _row_config(features, 0, small_outputs, "plain", 1, x.dtype)
            grid = (rows * cdiv(small_outputs, config.constants["BP"]),)
            launch(decode_row_kernel, grid, config, value, weight, None, None, None, small_weight, y, small, 0, eps)
        return y, small
    y = x.new_empty(rows, outputs)
    tensors = (x, weight, norm_weight, gate, residual, small_weight, y, small)
    if single:
        config = _row_config(features, outputs, small_outputs, input, head, x.dtype)
        programs = config.constants["BLOCKS"] + cdiv(small_outputs, config.constants["BP"])
        launch(decode_row_kernel, (rows * programs,), config, *tensors, gate_stride, eps)
        return y, small
    config = _rows_config(features, outputs, small_outputs, input, head, rows)
    grid = (config.constants["BLOCKS"] + rows * cdiv(small_outputs, config.constants["BP"]),)
    launch(decode_rows_kernel, grid, config, *tensors, rows, gate_stride, eps)
    return y, small


def _arguments(kernel: Any, dtype: torch.dtype, input: str, residual: bool, small: bool) -> dict[str, str | None]:
    kind = pointer(dtype)
    arguments: dict[str, str | None] = dict.fromkeys(("x", "weight", "y", "result"), kind)
    arguments |= {
        "norm_weight": kind if input.endswith("rms_norm") else None,
        "gate": kind if input == "gated_rms_norm" else None,
        "residual": kind if residual else None,
        "small_weight": "*fp32" if small else None,
        "small": "*fp32" if small else kind,
        "rows": "i32",
        "gate_stride": "i32",
        "eps": "fp32",
    }
    return {name: kind for name, kind in arguments.items() if name in kernel.arg_names}


def variants() -> Iterator[KernelVariant]:
    """The layers of a decode step over widths and dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for width, head in ((64, 16), (320, 64), (1024, 256), (2048, 128)):
            cases = [
                ("rms_norm", 4 * width, 1, False, 44),
                ("gated_rms_norm", width, head, True, 0),
                ("swiglu", width, 1, True, 0),
                ("plain", 32000, 1, False, 0),
            ]
            for input, outputs, size, residual, small in cases:
                if not _fits(width, input, size):
                    continue
                label = f"F={width} O={outputs} {input} {dtype}"
                quick = width == 1024 and dtype == torch.bfloat16 and input == "rms_norm"
                config = _row_config(width, outputs, small, input, size, dtype)
                arguments = _arguments(decode_row_kernel, dtype, input, residual, small > 0)
                yield variant(label, decode_row_kernel, arguments, config, quick)
                if input != "plain":
                    prepare = Config(_row_constants(width, input, size))
                    arguments = _arguments(decode_prepare_kernel, dtype, input, False, False)
                    yield variant(label, decode_prepare_kernel, arguments, prepare, quick)
                if dtype == torch.float32:
                    continue
                arguments = _arguments(decode_rows_kernel, dtype, input, residual, small > 0)
                for rows in (16, 32):
                    config = _rows_config(width, outputs, small, input, size, rows)
                    yield variant(f"{label} BR={rows}", decode_rows_kernel, arguments, config, quick)
