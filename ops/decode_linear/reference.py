"""The linear layer of a decode step in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    small_weight: Tensor | None,
    input: str,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """``f(x) W^T`` and ``f(x) P^T``, float64; arguments as :func:`mom_compile.ops.decode_linear`."""
    value = x.double()
    if input == "swiglu":
        left, right = value.chunk(2, 1)
        value = left * torch.sigmoid(left) * right
    elif norm_weight is not None:
        heads = value.unflatten(1, (-1, norm_weight.shape[0]))
        heads = heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
        value = heads.flatten(1)
        if gate is not None:
            value = value * gate.double() * torch.sigmoid(gate.double())
    return value @ weight.double().t(), None if small_weight is None else value @ small_weight.double().t()
