"""The linear layer of a decode step in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def prepare(x: Tensor, norm_weight: Tensor | None, gate: Tensor | None, input: str, eps: float) -> Tensor:
    """f(x) of :func:`mom_compile.ops.decode_linear`, in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if input == "swiglu":
        left, right = x.to(dtype).chunk(2, 1)
        return (F.silu(left) * right).to(x.dtype)
    if norm_weight is None:
        return x
    value = x.to(dtype).unflatten(1, (-1, norm_weight.shape[0]))
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    value = value.flatten(1)
    if gate is not None:
        value = value * F.silu(gate.to(dtype))
    return value.to(x.dtype)


def products(
    value: Tensor, weight: Tensor, residual: Tensor | None, small_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both products of f(x); an absent one is ``[0]``."""
    y = value @ weight.t() if residual is None else torch.addmm(residual, value, weight.t())
    small = value.new_empty(0) if small_weight is None else value.to(small_weight.dtype) @ small_weight.t()
    return y, small


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return products(prepare(x, norm_weight, gate, input, eps), weight, residual, small_weight)
