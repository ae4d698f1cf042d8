"""Gates of the rows in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import CHUNK


def _token_and_group(slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of each row, 0 where it has none."""
    token = torch.div(entry_of.clamp(min=0), max(slot_of.shape[1], 1), rounding_mode="floor").long()
    return token, (chunk_segment.clamp(min=0) % groups).long().repeat_interleave(CHUNK)


def gate_rows_fwd(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> Tensor:
    if gates.shape[0] == 0:
        return gates.new_zeros(gates.shape[2], entry_of.shape[0], gates.shape[3])
    rows = gates[_token_and_group(slot_of, entry_of, chunk_segment, gates.shape[1])]  # [S, n, HV]
    return rows.masked_fill_((entry_of < 0).view(-1, 1, 1), 0).transpose(0, 1).contiguous()


def gate_rows_bwd(drows: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor, groups: int) -> Tensor:
    count, _, heads = drows.shape
    dgates = drows.new_zeros(slot_of.shape[0], groups, count, heads)
    if dgates.shape[0]:
        places = _token_and_group(slot_of, entry_of, chunk_segment, groups)
        real = drows.transpose(0, 1).masked_fill((entry_of < 0).view(-1, 1, 1), 0)
        dgates.index_put_(places, real, accumulate=True)
    return dgates
