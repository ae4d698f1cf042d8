"""A linear map to few outputs, in float32 whatever the inputs' dtype."""

from __future__ import annotations

from torch import Tensor

from .op import small_linear as _small_linear
from .reference import small_linear_reference

__all__ = ["small_linear", "small_linear_reference"]


def small_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` with exact products, sums and result in float32: for routers and gates of 16-bit activations.

    The gradient enters in float32 too and is rounded once, when it is that of x or of the weight.

    Args:
        x: ``[..., D]`` floating point.
        weight: ``[n, D]``, dtype of x; n is small: x is read once for every 64 outputs.

    Returns:
        ``[..., n]`` float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: mom-compile; a product of two bfloat16 numbers is a float32 number.
    """
    y = _small_linear(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])
