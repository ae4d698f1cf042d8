"""Chunked cross entropy under a linear projection in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tensors import wide

CHUNK_ELEMENTS = 1 << 22
"""Logits that are made at once: few enough to stay in a cache."""


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(x.dtype)
    total = x.new_zeros((), dtype=dtype)
    dx = torch.empty_like(x) if grads else x.new_empty(0)
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if grads else x.new_empty(0)
    step = max(CHUNK_ELEMENTS // max(weight.shape[0], 1), 1)
    for start in range(0, x.shape[0], step):
        rows, labels = x[start : start + step], target[start : start + step]
        logits = (rows @ weight.t()).to(dtype)
        counts = labels != ignore_index
        index = torch.where(counts, labels, 0).unsqueeze(1)
        log_sum = logits.logsumexp(1, keepdim=True)
        total += torch.where(counts.unsqueeze(1), log_sum - logits.gather(1, index), 0).sum()
        if grads:
            grad = (logits - log_sum).exp_()
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
            grad = (grad * counts.unsqueeze(1)).to(x.dtype)
            dx[start : start + step] = grad @ weight
            dweight += grad.t() @ rows
    return total, dx, dweight.to(weight.dtype)
