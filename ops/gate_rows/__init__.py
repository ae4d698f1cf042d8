"""Gates of the rows of a dispatch plan, out of those of the tokens for every memory."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import DispatchPlan
from .op import gate_rows as _gate_rows
from .reference import gate_rows_reference

__all__ = ["gate_rows", "gate_rows_reference"]


def gate_rows(gates: Tensor, plan: DispatchPlan) -> Tensor:
    """Give each row its token's gates for its own memory; pad rows are zero.

    Args:
        gates: ``[T, G, n, HV]`` float32, n gates of each head for G groups: the memories, or one for all of them.
        plan: from :func:`mom_compile.ops.dispatch`.

    Returns:
        ``[n, S, HV]``: each gate lies in one piece. The gradient of a token is the sum over its slots, without atomics.

    Raises:
        ValueError: a shape or dtype that does not fit the plan.

    Source: mom-compile; the layout is that of ``DispatchPlan``.
    """
    return _gate_rows(gates, plan.slot_of, plan.entry_of, plan.chunk_segment)
