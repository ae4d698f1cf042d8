"""Gates of the rows, row by row in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import CHUNK


def gate_rows_reference(gates: Tensor, slot_of: Tensor, entry_of: Tensor, chunk_segment: Tensor) -> Tensor:
    """``[n, S, HV]`` float64."""
    choices, segments = slot_of.shape[1], chunk_segment.tolist()
    rows = [
        gates[entry // choices, segments[row // CHUNK] % gates.shape[1]].double() if entry >= 0 else None
        for row, entry in enumerate(entry_of.tolist())
    ]
    zero = gates.double().sum() * 0 + torch.zeros(gates.shape[2:], dtype=torch.float64)
    return torch.stack([zero if row is None else row for row in rows], 1)
