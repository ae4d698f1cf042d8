"""The linear map in float64."""

from __future__ import annotations

from torch import Tensor


def small_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """``y[t] = weight x[t]``, ``[T, n]`` float64."""
    return x.double() @ weight.double().t()
