"""Top-k routing written out per token, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def route_reference(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Softmax over M, the k most probable memories (ties: the lowest index), weights renormalised to sum 1.

    Args:
        logits: ``[T, M]``.
        topk: k.

    Returns:
        weights ``[T, k]`` float64 (differentiable) and indices ``[T, k]`` int64, by descending logit.

    Source: MoM (arXiv 2502.13685) section 3.2.1, equation 5.
    """
    chosen = []
    for row in logits.tolist():
        chosen.append(sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))[:topk])  # type: ignore[misc]
    indices = torch.tensor(chosen, dtype=torch.int64).view(logits.shape[0], topk)
    probability = torch.softmax(logits.double(), -1).gather(1, indices)
    return probability / probability.sum(-1, keepdim=True), indices
