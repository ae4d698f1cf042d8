"""A linear layer over a few rows, with what stands before and after it in a decode step."""

from __future__ import annotations

from torch import Tensor

from .op import INPUTS, decode_linear_in_place
from .op import decode_linear as _decode_linear
from .reference import decode_linear_reference

__all__ = ["INPUTS", "decode_linear", "decode_linear_", "decode_linear_reference"]


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    input: str = "plain",
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    small_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """``f(x) W^T`` and, from the same f(x), a float32 product with ``small_weight``.

    Up to four rows read the weights at the speed of memory; more go to the matrix product of torch.

    Args:
        x: ``[N, F]`` floating point; ``[N, 2 F]`` for swiglu.
        weight: ``[O, F]``, dtype of x.
        input: f. ``plain``: x. ``rms_norm``: ``RMSNorm(x)``. ``gated_rms_norm``: ``RMSNorm(x) SiLU(gate)`` with the \
norm over heads of V = len(norm_weight). ``swiglu``: ``SiLU(x[:, :F]) x[:, F:]``. f(x) is rounded to the dtype of x.
        norm_weight: ``[F]`` for rms_norm, ``[V]`` for gated_rms_norm, dtype of x.
        gate: ``[N, F]`` for gated_rms_norm, dtype of x; None: no gate. Its rows may lie apart.
        small_weight: ``[P, F]`` float32 (float64 for float64 x).
        eps: added to the mean square.

    Returns:
        ``[N, O]`` in the dtype of x, and ``[N, P]`` in the dtype of ``small_weight`` (None without it). Not
        differentiable: it serves decoding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: RMSNorm (arXiv 1910.07467) equation 4; SwiGLU (arXiv 2002.05202).
    """
    y, small = _decode_linear(x, weight, norm_weight, gate, small_weight, input, eps)
    return y, None if small_weight is None else small


def decode_linear_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    input: str = "plain",
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """``residual += f(x) W^T`` in place, f as for :func:`decode_linear`.

    Args:
        residual: ``[N, O]``, dtype of x, contiguous; no other argument may share its memory.
        x, weight, input, norm_weight, gate, eps: as for :func:`decode_linear`.

    Raises:
        ValueError: as :func:`decode_linear`, and for a residual of another shape or dtype, or a strided one.

    Source: see :func:`decode_linear`.
    """
    decode_linear_in_place(residual, x, weight, norm_weight, gate, input, eps)
