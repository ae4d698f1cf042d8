"""Token rows copied into the aligned layout, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_reference(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    """``rows[r] = x[entry_of[r] // k']``, zero where ``entry_of`` is -1. x ``[T, F]`` -> ``[S, F]`` float64."""
    choices = slot_of.shape[1]
    rows = [
        x[entry // choices].double() if entry >= 0 else x.new_zeros(x.shape[1], dtype=torch.float64)
        for entry in entry_of.tolist()
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], dtype=torch.float64)
