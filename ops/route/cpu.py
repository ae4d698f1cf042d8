"""Top-k routing in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def route_fwd(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    # A stable sort keeps the lowest index first among equals; torch.topk promises no order.
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return torch.softmax(values[:, :topk], -1), order[:, :topk].contiguous()


def route_bwd(dweights: Tensor, weights: Tensor, indices: Tensor, num_memories: int) -> Tensor:
    selected = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    return selected.new_zeros(weights.shape[0], num_memories).scatter_(1, indices, selected)
