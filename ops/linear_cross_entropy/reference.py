"""Cross entropy under a linear projection, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Sum over the rows that count of ``logsumexp(z) - z[target]``, ``z = x weight^T``, float64."""
    logits = x.double() @ weight.double().t()
    rows = [
        torch.logsumexp(row, 0) - row[index]
        for row, index in zip(logits, target.tolist(), strict=True)
        if index != ignore_index
    ]
    return torch.stack(rows).sum() if rows else logits.sum() * 0
