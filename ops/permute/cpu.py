"""Token rows to aligned rows and back, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tensors import wide


def permute_fwd(x: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    token = torch.div(entry_of, max(slot_of.shape[1], 1), rounding_mode="floor")
    if x.shape[0] == 0:
        return x.new_zeros(entry_of.shape[0], x.shape[1])
    return x.index_select(0, token.clamp(min=0)).masked_fill_((token < 0).unsqueeze(1), 0)


def permute_bwd(drows: Tensor, slot_of: Tensor) -> Tensor:
    dx = torch.zeros(slot_of.shape[0], drows.shape[1], dtype=wide(drows.dtype), device=drows.device)
    if drows.shape[0]:
        for choice in range(slot_of.shape[1]):
            slot = slot_of[:, choice]
            dx += drows.index_select(0, slot.clamp(min=0)).masked_fill_((slot < 0).unsqueeze(1), 0)
    return dx.to(drows.dtype)
