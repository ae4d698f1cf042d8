"""The linear layer of a decode step in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    small_weight: Tensor | None = None,
    norm: bool = False,
    swiglu: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """``h(f(x) W^T)`` and ``f(x) P^T``, float64; arguments as :func:`mom_compile.ops.decode_linear`."""
    value = x.double()
    if norm:
        value = value / (value.square().mean(-1, keepdim=True) + eps).sqrt()
        value = value if norm_weight is None else value * norm_weight.double()
    y = value @ weight.double().t()
    if swiglu:
        left, right = y.chunk(2, 1)
        y = left * torch.sigmoid(left) * right
    return y, None if small_weight is None else value @ small_weight.double().t()
