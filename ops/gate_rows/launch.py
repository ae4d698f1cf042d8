"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import Config, cdiv, launch, next_power_of_2, variant
from .._layout import CHUNK
from .kernels import gate_rows_bwd_kernel, gate_rows_kernel


def _config(groups: int, parts: int, heads: int, choices: int, backward: bool = False) -> Config:
    constants = {"G": groups, "PARTS": parts, "HV": heads, "CHOICES": choices, "CHUNK": CHUNK}
    constants["BLOCK_C"] = min(next_power_of_2(max(parts * heads, 2)), 64)
    if backward:
        constants["BLOCK_T"] = max(min(1024 // constants["BLOCK_C"], 128), 16)
    return Config(constants)


def gate_rows_fwd(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> Tensor:
    tokens, groups, parts, heads = gates.shape
    rows, chunks = entry_of.shape[0], chunk_segment.shape[0]
    out = gates.new_empty(parts, rows, heads)
    config = _config(groups, parts, heads, max(slot_of.shape[1], 1))
    launch(gate_rows_kernel, (chunks,), config, gates, entry_of, chunk_segment, out, tokens, rows)
    return out


def gate_rows_bwd(drows: Tensor, slot_of: Tensor, chunk_segment: Tensor, groups: int) -> Tensor:
    parts, rows, heads = drows.shape
    tokens, choices = slot_of.shape
    dgates = drows.new_empty(tokens, groups, parts, heads)
    config = _config(groups, parts, heads, choices, backward=True)
    grid = (cdiv(tokens, config.constants["BLOCK_T"]),)
    launch(gate_rows_bwd_kernel, grid, config, drows, slot_of, chunk_segment, dgates, tokens, rows)
    return dgates


def variants() -> Iterator[KernelVariant]:
    for groups, parts, heads, choices in ((5, 2, 4, 3), (1, 1, 6, 2), (65, 2, 16, 9), (9, 3, 64, 2)):
        label, quick = f"G={groups} n={parts} HV={heads} choices={choices}", groups == 5
        sizes = {"tokens": "i32", "rows": "i32"}
        arguments = {"gates": "*fp32", "entry_of": "*i32", "chunk_segment": "*i32", "out": "*fp32", **sizes}
        yield variant(label, gate_rows_kernel, arguments, _config(groups, parts, heads, choices), quick)
        arguments = {"drows": "*fp32", "slot_of": "*i32", "chunk_segment": "*i32", "dgates": "*fp32", **sizes}
        yield variant(label, gate_rows_bwd_kernel, arguments, _config(groups, parts, heads, choices, True), quick)
