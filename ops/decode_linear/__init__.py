"""A linear layer over a few rows, with what stands before and after it in a decode step."""

from __future__ import annotations

from torch import Tensor

from .op import decode_linear as _decode_linear
from .op import decode_linear_in_place
from .reference import decode_linear_reference

__all__ = ["decode_linear", "decode_linear_", "decode_linear_reference"]


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    small_weight: Tensor | None = None,
    norm: bool = False,
    swiglu: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """``h(f(x) W^T)`` and, from the same f(x), a float32 product with ``small_weight``.

    Few rows read the weights at the speed of memory; more go to the matrix product of torch.

    Args:
        x: ``[N, F]`` floating point.
        weight: ``[O, F]``, dtype of x.
        norm_weight: ``[F]``, dtype of x, with ``norm``: the norm's weight; None where the columns of the other weights
            have been multiplied by it, which is faster.
        small_weight: ``[P, F]`` float32 (float64 for float64 x).
        norm: f is RMSNorm, otherwise the identity.
        swiglu: h multiplies the halves of its input, ``SiLU(left) right``; O is then even.
        eps: added to the mean square.

    Returns:
        ``[N, O]`` (``[N, O / 2]`` with ``swiglu``) in the dtype of x, and ``[N, P]`` in the dtype of ``small_weight``
        (None without it). Not differentiable: it serves decoding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: RMSNorm (arXiv 1910.07467) equation 4; SwiGLU (arXiv 2002.05202).
    """
    y, small = _decode_linear(x, weight, norm_weight, small_weight, norm, swiglu, eps)
    return y, None if small_weight is None else small


def decode_linear_(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """``residual += x W^T`` in place.

    Args:
        residual: ``[N, O]``, dtype of x, contiguous; no other argument may share its memory.
        x, weight: as for :func:`decode_linear`.

    Raises:
        ValueError: as :func:`decode_linear`, and for a residual of another shape or dtype, or a strided one.

    Source: see :func:`decode_linear`.
    """
    decode_linear_in_place(residual, x, weight)
