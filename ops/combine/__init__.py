"""The weighted sum of what a token read from its memories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import DispatchPlan
from .op import combine as _combine
from .reference import combine_reference

__all__ = ["combine", "combine_reference", "gather_tokens"]


def combine(o: Tensor, weights: Tensor, plan: DispatchPlan) -> Tensor:
    """``o_t = sum_m w_m o_m + o_shared``: bring the rows of a token back together.

    Args:
        o: ``[S, HV, V]`` rows of the plan's layout.
        weights: ``[T, k]`` float32 routing weights.
        plan: from :func:`mom_compile.ops.dispatch`; with a shared memory its row enters with weight 1.

    Returns:
        ``[T, HV, V]``, dtype of o; masked tokens are zero. Sums run in float32, without atomics.

    Raises:
        ValueError: shapes that do not fit the plan.

    Source: MoM (arXiv 2502.13685) equation 8.
    """
    return _combine(o, weights, plan.slot_of, plan.entry_of)


def gather_tokens(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows ``[S, h, d]`` of a one-memory plan (``sequence_plan``) back in token order, ``[T, h, d]``."""
    none = torch.empty(plan.slot_of.shape[0], 0, dtype=torch.float32, device=rows.device)
    return _combine(rows, none, plan.slot_of, plan.entry_of)
