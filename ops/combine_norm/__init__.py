"""The weighted sum of a token's memories, its RMSNorm and the SiLU gate in one pass."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import DispatchPlan
from .op import combine_norm as _combine_norm
from .reference import combine_norm_reference

__all__ = ["combine_norm", "combine_norm_reference"]


def combine_norm(
    o: Tensor, weights: Tensor, plan: DispatchPlan, gate: Tensor, norm_weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """``gated_rms_norm(combine(o, weights, plan), gate, norm_weight, eps)``; the sum is not rounded in between.

    Args:
        o: ``[S, HV, V]`` rows of the plan's layout.
        weights: ``[T, k]`` float32 routing weights.
        plan: from :func:`mom_compile.ops.dispatch`; with a shared memory its row enters with weight 1.
        gate: ``[T, HV, V]``, dtype of o.
        norm_weight: ``[V]``.
        eps: added to the mean square.

    Returns:
        ``[T, HV, V]``, dtype of o; masked tokens are zero. Arithmetic is float32 (float64 for
        float64), without atomics.

    Raises:
        ValueError: shapes or dtypes that do not fit the plan or each other.

    Source: MoM (arXiv 2502.13685) equation 8; RMSNorm (arXiv 1910.07467) equation 4.
    """
    return _combine_norm(o, weights, plan.slot_of, plan.entry_of, gate, norm_weight, eps)
