"""The weighted sum of a token's memories, token by token in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_reference(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    """``y_t = sum_{j<k} w_tj o[slot_tj]`` plus the shared memory's row with weight 1. ``[T, HV, V]`` float64."""
    topk = weights.shape[1]
    tokens = []
    for t, slots in enumerate(slot_of.tolist()):
        total = torch.zeros(o.shape[1:], dtype=torch.float64) * o.double().sum() * 0
        for j, slot in enumerate(slots):
            if slot >= 0:
                total = total + (weights[t, j].double() if j < topk else 1.0) * o[slot].double()
        tokens.append(total)
    return torch.stack(tokens) if tokens else o.new_zeros(0, *o.shape[1:], dtype=torch.float64)
