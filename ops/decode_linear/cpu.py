"""The linear layer of a decode step in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm(x) in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    value = x.to(dtype)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value if norm_weight is None else value * norm_weight.to(dtype)).to(x.dtype)


def product(value: Tensor, weight: Tensor, y: Tensor | None, swiglu: bool) -> Tensor:
    """``value W^T``, added to ``y`` in place where there is one; with ``swiglu`` its halves are multiplied."""
    if y is not None:
        return y.addmm_(value, weight.t())
    y = value @ weight.t()
    if not swiglu:
        return y
    left, right = y.to(torch.promote_types(y.dtype, torch.float32)).chunk(2, 1)
    return (F.silu(left) * right).to(y.dtype)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    small_weight: Tensor | None,
    norm: bool,
    swiglu: bool,
    eps: float,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as ``mom::decode_linear``; with ``y`` the product is added to it in place."""
    value = normed(x, norm_weight, eps) if norm else x
    small = x.new_empty(0) if small_weight is None else value.to(small_weight.dtype) @ small_weight.t()
    return product(value, weight, y, swiglu), small
