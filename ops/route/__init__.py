"""Top-k routing of tokens to memories."""

from __future__ import annotations

from torch import Tensor

from .op import route as _route
from .reference import route_reference

__all__ = ["route", "route_reference"]


def route(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Select each token's k memories: ``w = softmax(logits)`` over M, the top k renormalised to sum 1.

    Ties go to the lowest memory index, on every device and in every exported artifact.

    Args:
        logits: ``[..., M]`` float32 (or float64) router logits.
        topk: k, in [1, M].

    Returns:
        weights ``[..., k]`` in the dtype of the logits, summing to 1, and indices ``[..., k]`` int64 in [0, M), both by
        descending logit. Gradients flow from the weights to the selected logits.

    Raises:
        ValueError: another dtype, or k outside [1, M].

    Source: MoM (arXiv 2502.13685) section 3.2.1, equation 5.

    Example:
        >>> import torch
        >>> weights, indices = route(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 2)
        >>> indices.tolist(), weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    weights, indices = _route(logits.reshape(-1, logits.shape[-1]), topk)
    shape = (*logits.shape[:-1], topk)
    return weights.view(shape), indices.view(shape)
