"""From projections to the rows of the memory rules: convolution, SiLU, and the L2 norm of q and k, in one operator."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import DispatchPlan
from .op import conv_qkv as _conv_qkv
from .reference import conv_qkv_reference

__all__ = ["conv_qkv", "conv_qkv_reference"]


def conv_qkv(
    q: Tensor, kv: Tensor, weight: Tensor, plan: DispatchPlan, head_dim: int, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``l2_norm(silu(conv(.)))`` of q and k, ``silu(conv(.))`` of v, over each memory's own tokens.

    The same as :func:`permute` of q, :func:`short_conv_rows` of the channels q, k, v and :func:`l2_norm` per head of q
    and k, without what lies between in memory.

    Args:
        q: ``[T, H*K]`` projections of the tokens; each row takes those of its token.
        kv: ``[S, H*K + HV*V]`` projections of the rows, k before v.
        weight: ``[2*H*K + HV*V, W]`` taps of the channels q, k, v; the last one multiplies the current token.
        plan: the tables of the rows.
        head_dim: K.
        initial_state: ``[N * M', 2*H*K + HV*V, W-1]`` the inputs before each segment, oldest first; None: zeros.

    Returns:
        q, k ``[S, H, K]``, v ``[S, HV*V]``, zero on pad rows, and the final state like ``initial_state``; dtype of q.
        Sums run in float32. All carry gradients.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Source: MoM (arXiv 2502.13685) section 3.3, as flash-linear-attention's MomAttention.
    """
    return _conv_qkv(q, kv, weight, initial_state, plan.slot_of, plan.entry_of, *plan.segments, head_dim)
