"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, feature_block, launch, next_power_of_2, pointer, variant
from .._layout import CHUNK
from .kernels import final_state_kernel, initial_state_kernel, short_conv_bwd_kernel, short_conv_kernel


def _rows_config(features: int, width: int, activation: str) -> Config:
    block_f = feature_block(features, 64)
    constants = {"F": features, "WIDTH": width, "SILU": int(activation == "silu"), "CHUNK": CHUNK}
    return Config({**constants, "BLOCK_R": min(2048 // block_f, CHUNK), "BLOCK_F": block_f})


def _bwd_config(features: int, width: int) -> Config:
    block_f = feature_block(features, 64)
    # A tile of registers for each tap: more taps, fewer rows.
    block_r = min(8192 // (block_f * next_power_of_2(max(width, 4))), CHUNK)
    return Config({"F": features, "WIDTH": width, "CHUNK": CHUNK, "BLOCK_R": block_r, "BLOCK_F": block_f})


def _state_config(features: int, width: int) -> Config:
    constants = {"F": features, "WIDTH": width, "BLOCK_W": next_power_of_2(max(width - 1, 2))}
    return Config({**constants, "BLOCK_F": feature_block(features, 256)})


def _programs(blocks: int, features: int, config: Config) -> tuple[int]:
    return (blocks * cdiv(features, config.constants["BLOCK_F"]),)


def short_conv_fwd(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    (rows, features), width, segments = x.shape, weight.shape[1], segment_start.shape[0]
    y = torch.empty_like(x)
    final_state = x.new_empty(segments, features, width - 1)
    state = initial_state if width > 1 else None
    tables = segment_start, segment_length
    config = _rows_config(features, width, activation)
    launch(
        short_conv_kernel, _programs(rows // config.constants["BLOCK_R"], features, config), config,
        None, x, weight, state, *tables, chunk_segment, y, rows, segments,
    )  # fmt: skip
    if width > 1:
        config = _state_config(features, width)
        launch(
            final_state_kernel, _programs(segments, features, config), config,
            x, state, *tables, final_state, rows, segments,
        )  # fmt: skip
    return y, final_state


def short_conv_bwd(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, features), width, segments = x.shape, weight.shape[1], segment_start.shape[0]
    chunks = rows // CHUNK
    grad, dx = torch.empty_like(x), torch.empty_like(x)
    partial = torch.empty(chunks, width, features, dtype=torch.float32, device=x.device)
    dfinal, state = (dfinal_state, initial_state) if width > 1 else (None, None)
    tables = segment_start, segment_length
    config = _rows_config(features, width, activation)
    launch(
        short_conv_kernel, _programs(rows // config.constants["BLOCK_R"], features, config), config,
        dy, x, weight, state, *tables, chunk_segment, grad, rows, segments,
    )  # fmt: skip
    config = _bwd_config(features, width)
    launch(
        short_conv_bwd_kernel, _programs(chunks, features, config), config,
        grad, dfinal, x, weight, state, *tables, chunk_segment, dx, partial, rows, segments,
    )  # fmt: skip
    dweight = partial.sum(0).t().to(weight.dtype).contiguous()
    if initial_state is None:
        return dx, dweight, x.new_empty(0)
    dinitial = torch.empty_like(initial_state)
    if width > 1:
        config = _state_config(features, width)
        launch(
            initial_state_kernel, _programs(segments, features, config), config,
            grad, dfinal, weight, *tables, dinitial, rows, segments,
        )  # fmt: skip
    return dx, dweight, dinitial


def variants() -> Iterator[KernelVariant]:
    cases = [(features, 4, "silu", True) for features in (16, 48, 1280, 2048)]
    cases += [(16, 2, "silu", True), (1280, 2, "silu", True), (256, 4, "none", False)]
    cases += [(64, 1, "silu", False)]
    for features, width, activation, stateful in cases:
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            quick = (features, width) == (1280, 4) and dtype == KERNEL_DTYPES[1]
            label = f"F={features} W={width} {activation} state={stateful} {dtype}"
            state = kind if stateful else None
            tables = {"segment_start": "*i32", "segment_length": "*i32"}
            inputs: dict[str, str | None] = {"x": kind, "weight": kind, "state": state, **tables}
            grads: dict[str, str | None] = {"grad": kind, "dfinal": state}
            sizes = {"rows": "i32", "segments": "i32"}
            config = _rows_config(features, width, activation)
            for dy in (None, kind):
                arguments: dict[str, str | None] = {"dy": dy, **inputs, "chunk_segment": "*i32", "y": kind, **sizes}
                case = label if dy is None else f"{label} gradient"
                yield variant(case, short_conv_kernel, arguments, config, quick)
            arguments = {**grads, **inputs, "chunk_segment": "*i32", "dx": kind, "partial": "*fp32", **sizes}
            yield variant(label, short_conv_bwd_kernel, arguments, _bwd_config(features, width), quick)
            if width == 1:
                continue
            arguments = {"x": kind, "state": state, **tables, "final_state": kind, **sizes}
            yield variant(label, final_state_kernel, arguments, _state_config(features, width), quick)
            if stateful:
                arguments = {**grads, "weight": kind, **tables, "dstate": kind, **sizes}
                yield variant(label, initial_state_kernel, arguments, _state_config(features, width), quick)
