"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, pointer, variant
from .._layout import CHUNK
from .._triton import INTERPRET
from .kernels import conv_qkv_bwd_kernel, conv_qkv_edge_kernel, conv_qkv_kernel

CHANNELS = 256
"""Of a row, for one program."""


def _config(
    heads: int, head_dim: int, values: int, width: int, choices: int, unroll: int = 0, backward: bool = False
) -> Config:
    block_k = next_power_of_2(max(head_dim, 16))
    # The interpreter pays for every operation on a tile, whatever its size.
    block_h = max((1 << 14 if INTERPRET else CHANNELS) // block_k, 1)
    block_h = min(block_h, next_power_of_2(max(heads, cdiv(values, block_k), 1)))
    constants = {"H": heads, "K": head_dim, "VS": values, "WIDTH": width, "CHOICES": choices}
    constants |= {"BLOCK_H": block_h, "BLOCK_K": block_k}
    if unroll:
        constants |= {"CHUNK": CHUNK, "UNROLL": unroll}
    # A thread takes 8 channels, one load of 16 bytes; in the backward 4, whose sums fill its registers.
    return Config(constants, num_warps=max(min(block_h * block_k, 512) // (128 if backward else 256), 1))


def _programs(count: int, config: Config) -> tuple[int]:
    c = config.constants
    return (count * (2 * cdiv(c["H"], c["BLOCK_H"]) + cdiv(c["VS"], c["BLOCK_H"] * c["BLOCK_K"])),)


def _sizes(q: Tensor, kv: Tensor, weight: Tensor, slot_of: Tensor, head_dim: int) -> tuple[int, int, int, int, int]:
    return q.shape[1] // head_dim, head_dim, kv.shape[1] - q.shape[1], weight.shape[1], max(slot_of.shape[1], 1)


def conv_qkv_fwd(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    slot_of: Tensor,
    entry_of: Tensor,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = heads, _, values, width, _ = _sizes(q, kv, weight, slot_of, head_dim)
    rows, tokens, segments = kv.shape[0], q.shape[0], segment_start.shape[0]
    q_out = q.new_empty(rows, heads, head_dim)
    k_out, v_out = torch.empty_like(q_out), q.new_empty(rows, values)
    final_state = q.new_empty(segments, weight.shape[0], width - 1)
    state = initial_state if width > 1 else None
    config = _config(*sizes, unroll=4)
    launch(
        conv_qkv_kernel, _programs(rows // CHUNK, config), config, q, kv, weight, state, entry_of, segment_start,
        segment_length, chunk_segment, q_out, k_out, v_out, rows, tokens, segments,
    )  # fmt: skip
    if width > 1:
        config = _config(*sizes)
        launch(
            conv_qkv_edge_kernel, _programs(segments, config), config, None, None, None, None, q, kv, weight, state,
            entry_of, segment_start, segment_length, final_state, rows, tokens,
        )  # fmt: skip
    return q_out, k_out, v_out, final_state


def conv_qkv_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    slot_of: Tensor,
    entry_of: Tensor,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _, _, _, width, _ = _sizes(q, kv, weight, slot_of, head_dim)
    rows, tokens, segments = kv.shape[0], q.shape[0], segment_start.shape[0]
    dq_rows, dkv = q.new_empty(rows, q.shape[1]), torch.empty_like(kv)
    partial = torch.empty(rows // CHUNK, width, weight.shape[0], dtype=torch.float32, device=q.device)
    dfinal, state = (dfinal_state, initial_state) if width > 1 else (None, None)
    by_slot = None if dfinal is None else dfinal.transpose(1, 2).contiguous()
    config = _config(*sizes, unroll=2 if width > 4 else 4, backward=True)
    launch(
        conv_qkv_bwd_kernel, _programs(rows // CHUNK, config), config, dq, dk, dv, by_slot, q, kv, weight, state,
        entry_of, segment_start, segment_length, chunk_segment, dq_rows, dkv, partial, rows, tokens, segments,
    )  # fmt: skip
    dweight = partial.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format).contiguous()
    if initial_state is None:
        return dq_rows, dkv, dweight, q.new_empty(0)
    dinitial = torch.empty_like(initial_state)
    if width > 1:
        config = _config(*sizes)
        launch(
            conv_qkv_edge_kernel, _programs(segments, config), config, dq, dk, dv, dfinal, q, kv, weight, state,
            entry_of, segment_start, segment_length, dinitial, rows, tokens,
        )  # fmt: skip
    return dq_rows, dkv, dweight, dinitial


_TABLES = {"entry_of": "*i32", "segment_start": "*i32", "segment_length": "*i32"}


def variants() -> Iterator[KernelVariant]:
    cases = [(4, 256, 1024, 4, True), (2, 64, 256, 4, True), (1, 100, 200, 3, False), (3, 16, 48, 2, True)]
    cases += [(2, 512, 512, 4, False), (1, 64, 64, 1, False)]
    for heads, head_dim, values, width, stateful in cases:
        for dtype in KERNEL_DTYPES:
            kind = pointer(dtype)
            state = kind if stateful else None
            quick = head_dim == 256 and dtype == torch.bfloat16
            label = f"H={heads} K={head_dim} VS={values} W={width} state={stateful} {dtype}"
            inputs: dict[str, str | None] = {"q": kind, "kv": kind, "weight": kind, "state": state, **_TABLES}
            sizes: dict[str, str | None] = {"rows": "i32", "tokens": "i32"}
            grads: dict[str, str | None] = {"dq": kind, "dk": kind, "dv": kind, "dfinal": state}
            shape = heads, head_dim, values, width, 3
            more: dict[str, str | None] = {"chunk_segment": "*i32", "segments": "i32"}
            outputs: dict[str, str | None] = {"q_out": kind, "k_out": kind, "v_out": kind}
            config = _config(*shape, unroll=4)
            yield variant(label, conv_qkv_kernel, {**inputs, **more, **outputs, **sizes}, config, quick)
            outputs = {"dq_rows": kind, "dkv": kind, "partial": "*fp32"}
            config = _config(*shape, unroll=4, backward=True)
            arguments = {**grads, **inputs, **more, **outputs, **sizes}
            few_taps = head_dim == 16 and dtype == torch.bfloat16  # compiles in a quarter of the time
            yield variant(label, conv_qkv_bwd_kernel, arguments, config, quick=few_taps)
            if width == 1:
                continue
            config = _config(*shape)
            arguments = {**dict.fromkeys(grads), **inputs, "out": kind, **sizes}
            yield variant(label, conv_qkv_edge_kernel, arguments, config, quick)
            if stateful:
                arguments = {**grads, **inputs, "out": kind, **sizes}
                yield variant(f"{label} gradient", conv_qkv_edge_kernel, arguments, config, quick)
