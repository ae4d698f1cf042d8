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


def product(value: Tensor, weight: Tensor, y: Tensor | None) -> Tensor:
    """``value W^T``, added to ``y`` in place where there is one."""
    return value @ weight.t() if y is None else y.addmm_(value, weight.t())


def decode_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as ``mom::decode_linear``; with ``y`` the product is added to it in place."""
    value = prepare(x, norm_weight, gate, input, eps)
    small = x.new_empty(0) if small_weight is None else value.to(small_weight.dtype) @ small_weight.t()
    return product(value, weight, y), small
