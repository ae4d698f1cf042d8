"""Copy of token rows into the aligned layout of a dispatch plan."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import DispatchPlan
from .op import permute as _permute
from .op import permute_bwd as _permute_bwd
from .reference import permute_reference

__all__ = ["permute", "permute_reference", "unpermute_sum"]


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token's row to every slot that the plan gave it; pad rows are zero.

    Args:
        x: ``[T, F]`` floating point.
        plan: from :func:`mom_compile.ops.dispatch`.

    Returns:
        ``[S, F]`` rows, dtype of x. The gradient of a token is the sum over its slots, in float32, without atomics.

    Raises:
        ValueError: a shape or dtype that does not fit the plan.

    Source: the permutation step of mixture-of-experts layers (MegaBlocks, arXiv 2211.15841, section 5).
    """
    return _permute(x, plan.slot_of, plan.entry_of)


def unpermute_sum(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """The transpose of :func:`permute`: ``[S, F]`` -> ``[T, F]``, each token the sum over its slots. No gradient."""
    return _permute_bwd(rows, plan.slot_of)
