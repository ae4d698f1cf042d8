"""RMSNorm followed by a SiLU gate."""

from __future__ import annotations

from torch import Tensor

from .op import gated_rms_norm as _gated_rms_norm
from .reference import gated_rms_norm_reference

__all__ = ["gated_rms_norm", "gated_rms_norm_reference"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``RMSNorm(x) * SiLU(gate)``: ``x rsqrt(mean x^2 + eps) weight gate sigmoid(gate)`` over the last axis.

    Args:
        x, gate: ``[..., V]`` floating point; arithmetic is float32 (float64 for float64 inputs).
        weight: ``[V]``.
        eps: added to the mean square.

    Returns:
        ``[..., V]``, dtype of x.

    Raises:
        ValueError: shapes that differ.

    Source: RMSNorm (arXiv 1910.07467) equation 4; the gate as in RetNet (arXiv 2307.08621) equation 8.
    """
    return _gated_rms_norm(x, gate, weight, eps)
