"""Triton kernels of the rows' gates. A chunk lies in one segment, so that its rows have one memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "rows"])
def gate_rows_kernel(
    gates, entry_of, chunk_segment, out, tokens, rows,
    G: tl.constexpr, PARTS: tl.constexpr, HV: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gates of the rows of one chunk."""
    C: tl.constexpr = PARTS * HV
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    entry = tl.load(entry_of + row)
    token = entry // CHOICES
    real = (entry >= 0) & (token < tokens)
    group = tl.maximum(tl.load(chunk_segment + chunk), 0) % G
    for first in range(0, C, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        source = gates + (token.to(tl.int64) * G + group)[:, None] * C + column[None, :]
        value = tl.load(source, mask=real[:, None] & (column < C)[None, :], other=0.0)
        part = (column // HV).to(tl.int64)
        target = out + (part[None, :] * rows + row[:, None]) * HV + (column % HV)[None, :]
        tl.store(target, value, mask=(column < C)[None, :] & (row >= 0)[:, None])


@triton.jit(do_not_specialize=["tokens", "rows"])
def gate_rows_bwd_kernel(
    drows, slot_of, chunk_segment, dgates, tokens, rows,
    G: tl.constexpr, PARTS: tl.constexpr, HV: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dgates[t, g]``: the sum over the slots of t that lie in group g."""
    C: tl.constexpr = PARTS * HV
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    present = token < tokens
    for group in range(G):
        for first in range(0, C, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            part = (column // HV).to(tl.int64)
            total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
            for j in tl.static_range(CHOICES):
                slot = tl.load(slot_of + token * CHOICES + j, mask=present, other=-1)
                hit = (slot >= 0) & (slot < rows)
                segment = tl.load(chunk_segment + slot // CHUNK, mask=hit, other=-1)
                hit = hit & (segment >= 0) & (segment % G == group)
                source = drows + (part[None, :] * rows + slot.to(tl.int64)[:, None]) * HV + (column % HV)[None, :]
                total += tl.load(source, mask=hit[:, None] & (column < C)[None, :], other=0.0)
            target = dgates + (token * G + group)[:, None] * C + column[None, :]
            tl.store(target, total, mask=present[:, None] & (column < C)[None, :])
