"""The short depthwise causal convolution of each memory's own tokens."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_rank
from ..combine import gather_tokens
from ..dispatch import DispatchPlan, sequence_plan
from ..permute import permute
from .op import short_conv as _short_conv
from .reference import short_conv_reference

__all__ = ["short_conv", "short_conv_reference", "short_conv_rows"]


def short_conv_rows(
    x: Tensor, weight: Tensor, plan: DispatchPlan, initial_state: Tensor | None = None, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """:func:`short_conv` on rows already placed: x ``[S, F]``, states ``[N * M', F, W-1]``; pad rows must be zero."""
    return _short_conv(x, weight, initial_state, *plan.segments, activation)


def short_conv(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """``y_t = act(sum_i weight[:, i] x_{t-(W-1)+i})``: depthwise, causal, never across a sequence boundary.

    Args:
        x: ``[B, T, F]``, or ``[1, T, F]`` with ``cu_seqlens``.
        weight: ``[F, W]``; the last tap multiplies the current token.
        initial_state: ``[N, F, W-1]`` the inputs before the first token, oldest first; None: zeros.
        cu_seqlens: ``[N+1]`` int boundaries of packed documents; N = B without it.
        activation: ``silu`` or ``none``.

    Returns:
        y ``[B, T, F]`` and the final state ``[N, F, W-1]``, dtype of x. Sums run in float32. Both carry gradients.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown activation.

    Source: the short convolution of Mamba (arXiv 2312.00752), as in MoM (arXiv 2502.13685) section 3.3.
    """
    check_rank("x", x, "[B, T, F]")
    batch, length, channels = x.shape
    plan = sequence_plan(batch, length, cu_seqlens, x.device)
    rows = permute(x.reshape(batch * length, channels), plan)
    y, final_state = short_conv_rows(rows, weight, plan, initial_state, activation)
    return gather_tokens(y.unsqueeze(1), plan).view(batch, length, channels), final_state
