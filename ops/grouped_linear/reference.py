"""One linear map per group of rows, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear_reference(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    """``y[r] = weight[g] x[r]`` for the rows of group g; zero past the last group. ``[S, N]`` float64."""
    bounds = group_offset.tolist()
    parts = [x[a:b].double() @ weight[g].double().t() for g, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    tail = x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1], dtype=torch.float64)
    return torch.cat([*parts, tail])
