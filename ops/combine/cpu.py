"""The weighted sum of a token's memories in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tensors import wide


def combine_fwd(o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> Tensor:
    rows, topk = o.flatten(1), weights.shape[1]
    dtype = wide(o.dtype)
    y = torch.zeros(slot_of.shape[0], rows.shape[1], dtype=dtype, device=o.device)
    if rows.shape[0]:
        for j in range(slot_of.shape[1]):
            slot = slot_of[:, j]
            hit = (slot >= 0).to(dtype).unsqueeze(1)
            weight = hit * weights[:, j : j + 1].to(dtype) if j < topk else hit
            y.addcmul_(rows.index_select(0, slot.clamp(min=0)).to(dtype), weight)
    return y.to(o.dtype).view(slot_of.shape[0], *o.shape[1:])


def combine_bwd(dy: Tensor, o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor) -> tuple[Tensor, Tensor]:
    rows, topk, choices = o.flatten(1), weights.shape[1], slot_of.shape[1]
    dtype = wide(o.dtype)
    dy = dy.flatten(1).to(dtype)
    if dy.shape[0] == 0 or rows.shape[0] == 0:
        return torch.zeros_like(o), torch.zeros_like(weights)
    # The row's weight: 0 on pads, 1 for the shared memory.
    every = torch.cat([weights.to(dtype), weights.new_ones(weights.shape[0], choices - topk, dtype=dtype)], 1)
    entry = entry_of.long()
    weight = every.flatten()[entry.clamp(min=0)] * (entry >= 0)
    token = torch.div(entry, choices, rounding_mode="floor").clamp(min=0)
    do = dy.index_select(0, token).mul_(weight.unsqueeze(1))
    do.masked_fill_((entry < 0).unsqueeze(1), 0)
    dweights = torch.zeros_like(weights)
    for j in range(topk):
        slot = slot_of[:, j]
        dot = (rows.index_select(0, slot.clamp(min=0)).to(dtype) * dy).sum(1)
        dweights[:, j] = torch.where(slot >= 0, dot, 0)
    return do.to(o.dtype).view(o.shape), dweights
