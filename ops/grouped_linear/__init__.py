"""One linear map per memory, over the rows of that memory."""

from __future__ import annotations

from torch import Tensor

from .op import grouped_linear as _grouped_linear
from .reference import grouped_linear_reference

__all__ = ["grouped_linear", "grouped_linear_reference"]


def grouped_linear(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    """``y[r] = weight[g] x[r]`` where row r lies in group g.

    Args:
        x: ``[S, D]`` rows.
        weight: ``[G, N, D]``, dtype of x.
        group_offset: ``[G+1]`` int32 row bounds from 0, multiples of 64 (a dispatch plan's). On the CPU any rising
            bounds serve.

    Returns:
        ``[S, N]``; rows past the last group are zero.

    Raises:
        ValueError: wrong shapes or dtypes; on the CPU also bounds that do not rise.

    Source: the grouped matrix product of MegaBlocks (arXiv 2211.15841) section 4.
    """
    return _grouped_linear(x, weight, group_offset)
