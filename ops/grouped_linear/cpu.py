"""One linear map per group of rows, in PyTorch; the offsets are read on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear_fwd(x: Tensor, weight: Tensor, group_offset: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    bounds = group_offset.tolist()
    for group, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        torch.mm(x[start:end], weight[group].t(), out=y[start:end])
    y[bounds[-1] :] = 0
    return y


def grouped_linear_dweight(dy: Tensor, x: Tensor, group_offset: Tensor) -> Tensor:
    bounds = group_offset.tolist()
    dweight = x.new_empty(len(bounds) - 1, dy.shape[1], x.shape[1])
    for group, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        torch.mm(dy[start:end].t(), x[start:end], out=dweight[group])
    return dweight
