"""Cross entropy under a linear projection, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .op import linear_cross_entropy as _linear_cross_entropy
from .reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of ``target`` under the logits ``x weight^T``, a few rows of logits at a time.

    Where gradients are wanted they are computed in the forward and scaled in the backward: logits are made once and
    never kept. Logits round to the dtype of x, as a linear layer's do; everything after them, and the sum over the rows
    of the weight's gradient, is float32 (float64 for float64).

    Args:
        x: ``[..., D]`` floating point.
        weight: ``[V, D]``, dtype of x.
        target: ``[...]`` int64 in [0, V), or ``ignore_index``.
        ignore_index: rows with this target count for nothing.
        reduction: ``mean`` over the rows that count (0 where none does) or ``sum``.

    Returns:
        A float32 scalar (float64 for float64). Its gradient reaches x and weight; it has no second derivative.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction; on the CPU also a target out of
            range, which gives NaN on a GPU.

    Source: chunked loss with the gradients in the forward, as in Liger Kernel (arXiv 2410.10989) section 3.2.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be one of mean, sum, got {reduction!r}; choose one of them")
    grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    target = target.reshape(-1)
    total, _, _ = _linear_cross_entropy(x.reshape(-1, x.shape[-1]), weight, target, ignore_index, grads)
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)
