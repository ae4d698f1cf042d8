"""Launches of the Triton kernels, and the configurations that they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, pointer, variant
from . import cpu
from .kernels import decode_prepare_kernel, decode_row_kernel

CODES = {"plain": 0, "rms_norm": 1, "gated_rms_norm": 2, "swiglu": 3}
MOST_ROWS = 4
"""Above it the matrix product of torch takes over."""
MOST_FEATURES = 16384
PROGRAMS = 256
"""What a launch should at least have to keep the multiprocessors of a large GPU busy."""


def _constants(features: int, small: int, input: str, head: int) -> dict[str, Any]:
    # Without a norm by head V is not used; one value keeps the compiled kernels few.
    head = head if input == "gated_rms_norm" else 1
    wide = next_power_of_2(max(features, 16))
    block = max(min(4096 // wide, 4), 1)
    return {"F": features, "P": small, "INPUT": CODES[input], "V": head, "BF": wide, "BP": block}


def _row_config(
    features: int, outputs: int, small: int, input: str, head: int, add: bool, dtype: torch.dtype
) -> Config:
    constants = _constants(features, small, input, head)
    # A program holds whole rows of the weight in registers.
    block = max(min(16384 // constants["BF"] // (2 if dtype == torch.float32 else 1), 16), 1)
    while block > 1 and cdiv(outputs, block) < PROGRAMS:
        block //= 2
    warps = 8 if block * constants["BF"] >= 4096 else 4
    return Config(constants | {"OUT": outputs, "BO": block, "ADD": add}, num_warps=warps)


def _fits(features: int, input: str, head: int) -> bool:
    if input == "gated_rms_norm" and (head < 16 or head & (head - 1) or features & (features - 1)):
        return False
    return 0 < features <= MOST_FEATURES


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as ``mom::decode_linear``; with ``y`` the product is added to it in place."""
    rows, (outputs, features) = x.shape[0], weight.shape
    head = 1 if norm_weight is None else norm_weight.shape[0]
    if not _fits(features, input, head):
        return cpu.decode_linear(x, weight, norm_weight, gate, small_weight, input, eps, y)
    x, weight = x.contiguous(), weight.contiguous()
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    gate_stride = 0 if gate is None else gate.stride(0)
    norm_weight, small_weight = (None if t is None else t.contiguous() for t in (norm_weight, small_weight))
    small_outputs = 0 if small_weight is None else small_weight.shape[0]
    small = x.new_empty(0) if small_weight is None else small_weight.new_empty(rows, small_outputs)
    if rows <= MOST_ROWS:
        config = _row_config(features, outputs, small_outputs, input, head, y is not None, x.dtype)
        y = x.new_empty(rows, outputs) if y is None else y
        programs = cdiv(outputs, config.constants["BO"]) + cdiv(small_outputs, config.constants["BP"])
        launch(
            decode_row_kernel, (rows * programs,), config, x, weight, norm_weight, gate, small_weight, y, small,
            gate_stride, eps,
        )  # fmt: skip
        return y, small
    value = x
    if input != "plain" or small_weight is not None:
        value = x.new_empty(rows, features)
        config = Config(_constants(features, small_outputs, input, head))
        programs = rows * (1 + cdiv(small_outputs, config.constants["BP"]))
        launch(
            decode_prepare_kernel, (programs,), config, x, norm_weight, gate, small_weight, value, small,
            gate_stride, eps,
        )  # fmt: skip
    return cpu.product(value, weight, y), small


def _arguments(kernel: Any, dtype: torch.dtype, input: str, small: bool) -> dict[str, str | None]:
    kind = pointer(dtype)
    arguments: dict[str, str | None] = dict.fromkeys(("x", "weight", "y", "result"), kind)
    arguments |= {
        "norm_weight": kind if input.endswith("rms_norm") else None,
        "gate": kind if input == "gated_rms_norm" else None,
        "small_weight": "*fp32" if small else None,
        "small": "*fp32" if small else kind,
        "gate_stride": "i32",
        "eps": "fp32",
    }
    return {name: kind for name, kind in arguments.items() if name in kernel.arg_names}


def variants() -> Iterator[KernelVariant]:
    """The layers of a decode step over widths and dtypes."""
    for dtype in KERNEL_DTYPES:
        for width, head in ((64, 16), (320, 64), (1024, 256), (2048, 128)):
            cases = [
                ("rms_norm", 4 * width, 1, False, 44),
                ("gated_rms_norm", width, head, True, 0),
                ("swiglu", width, 1, True, 0),
                ("plain", 32000, 1, False, 0),
            ]
            for input, outputs, size, add, small in cases:
                if not _fits(width, input, size):
                    continue
                label = f"F={width} OUT={outputs} {input} {dtype}"
                quick = width == 1024 and dtype == torch.bfloat16 and input == "rms_norm"
                config = _row_config(width, outputs, small, input, size, add, dtype)
                arguments = _arguments(decode_row_kernel, dtype, input, small > 0)
                yield variant(label, decode_row_kernel, arguments, config, quick)
                if input != "plain":
                    config = Config(_constants(width, small, input, size))
                    arguments = _arguments(decode_prepare_kernel, dtype, input, small > 0)
                    yield variant(label, decode_prepare_kernel, arguments, config, quick)
