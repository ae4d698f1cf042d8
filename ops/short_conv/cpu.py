"""The short convolution in PyTorch: shifted sums over all rows, then the first W-1 rows of each segment anew."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import row_mask
from .._tensors import wide

BLOCK = 512
"""Rows worked on at once."""


def _heads(
    x: Tensor, initial_state: Tensor | None, width: int, segment_start: Tensor, segment_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows whose window leaves their segment.

    Returns ``rows [n]``, their windows ``[n, F, W]`` and, for each window position, its source ``[n, W]``: a row of x,
    or ``-1 - (segment * (W-1) + position)`` of the initial state.
    """
    offset = torch.arange(width - 1)
    segments = torch.arange(segment_start.shape[0]).unsqueeze(1)
    keep = offset < segment_length.long().unsqueeze(1)
    rows = (segment_start.long().unsqueeze(1) + offset)[keep]
    position = offset.expand_as(keep)[keep].unsqueeze(1) - (width - 1) + torch.arange(width)  # in the segment
    segment = segments.expand_as(keep)[keep].unsqueeze(1)
    start = segment_start.long()[segment]
    source = torch.where(position >= 0, start + position, -1 - (segment * (width - 1) + width - 1 + position))
    return rows, _take(x, initial_state, source, width), source


def _take(x: Tensor, initial_state: Tensor | None, source: Tensor, width: int) -> Tensor:
    """Gather ``[..., ]`` sources as ``[n, F, w]``."""
    values = x[source.clamp(min=0)] if x.shape[0] else x.new_zeros(*source.shape, x.shape[1])
    inside = (source >= 0).unsqueeze(-1)
    if initial_state is None:
        return torch.where(inside, values, 0).transpose(1, 2)
    history = initial_state.transpose(1, 2).reshape(-1, x.shape[1]).to(x.dtype)
    return torch.where(inside, values, history[(-1 - source).clamp(min=0)]).transpose(1, 2)


def _final_source(width: int, segment_start: Tensor, segment_length: Tensor) -> Tensor:
    position = segment_length.long().unsqueeze(1) - (width - 1) + torch.arange(width - 1)
    segment = torch.arange(segment_start.shape[0]).unsqueeze(1)
    history = -1 - (segment * (width - 1) + width - 1 + position)
    return torch.where(position >= 0, segment_start.long().unsqueeze(1) + position, history)


def _blocks(rows: int, width: int) -> list[tuple[int, int, int]]:
    """(first row of the window, first row, end) of row blocks that stay in the cache."""
    return [(max(start - width + 1, 0), start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]


def _linear(x: Tensor, taps: Tensor, low: int, start: int, end: int) -> Tensor:
    """The convolution of rows ``[start, end)`` as if all were one sequence."""
    width = taps.shape[1]
    y = x[start:end] * taps[:, -1]
    for shift in range(1, width):
        first = max(start - shift, low)
        y[first + shift - start :].addcmul_(x[first : end - shift], taps[:, width - 1 - shift])
    return y


def short_conv_fwd(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    dtype = wide(x.dtype)
    width = weight.shape[1]
    value, taps = x.to(dtype), weight.to(dtype)
    real = row_mask(segment_start, segment_length, chunk_segment).to(dtype).unsqueeze(1)
    rows, window, _ = _heads(value, initial_state, width, segment_start, segment_length)
    # The same sums in the same order for every row, and one activation for all: a row's bits must not depend on which
    # rows lie beside it, and vectorised code treats the end of a tensor in its own way.
    heads = window[..., -1] * taps[:, -1]
    for position in range(width - 2, -1, -1):
        heads.addcmul_(window[..., position], taps[:, position])
    rows, order = rows.sort()
    bounds = torch.searchsorted(rows, torch.arange(0, x.shape[0] + BLOCK, BLOCK)).tolist()
    y = torch.empty_like(value)
    for block, (low, start, end) in enumerate(_blocks(x.shape[0], width)):
        linear = _linear(value, taps, low, start, end)
        inside = slice(bounds[block], bounds[block + 1])
        linear[rows[inside] - start] = heads[order[inside]]
        torch.mul(_activate(linear, activation), real[start:end], out=y[start:end])
    final_state = _take(value, initial_state, _final_source(width, segment_start, segment_length), width)
    return y.to(x.dtype), final_state.to(x.dtype).contiguous()


def _activate(x: Tensor, activation: str) -> Tensor:
    return torch.nn.functional.silu(x, inplace=True) if activation == "silu" else x


def _through_activation(dy: Tensor, linear: Tensor, activation: str) -> Tensor:
    """The gradient of the convolution from that of its activation."""
    return torch.ops.aten.silu_backward(dy, linear) if activation == "silu" else dy.clone()


def short_conv_bwd(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(x.dtype)
    width = weight.shape[1]
    value, taps, dy = x.to(dtype), weight.to(dtype), dy.to(dtype)

    # Rows whose window leaves the segment go tap by tap to their sources, all others by shifted sums.
    rows, window, source = _heads(value, initial_state, width, segment_start, segment_length)
    head = _through_activation(dy[rows], (window * taps).sum(-1), activation)
    interior = row_mask(segment_start, segment_length, chunk_segment)
    interior[rows] = False
    inside = interior.to(dtype).unsqueeze(1)
    dweight = (head.unsqueeze(-1) * window).sum(0)
    dx = torch.zeros_like(value)
    for low, start, end in _blocks(x.shape[0], width):
        linear = _linear(value, taps, low, start, end)
        grad = _through_activation(dy[start:end], linear, activation).mul_(inside[start:end])
        for shift in range(width):
            first = max(start - shift, 0)
            part = grad[first + shift - start :]
            dx[first : end - shift].addcmul_(part, taps[:, width - 1 - shift])
            dweight[:, width - 1 - shift] += (part * value[first : end - shift]).sum(0)
    dhistory = x.new_zeros(segment_start.shape[0] * (width - 1), x.shape[1], dtype=dtype)
    _scatter(dx, dhistory, source, head.unsqueeze(-1) * taps)
    if dfinal_state is not None:
        _scatter(dx, dhistory, _final_source(width, segment_start, segment_length), dfinal_state.to(dtype))
    if initial_state is None:
        dinitial = x.new_empty(0)
    else:
        dhistory = dhistory.view(segment_start.shape[0], width - 1, x.shape[1])
        dinitial = dhistory.transpose(1, 2).to(initial_state.dtype).contiguous()
    return dx.to(x.dtype), dweight.to(weight.dtype), dinitial


def _scatter(dx: Tensor, dhistory: Tensor, source: Tensor, grad: Tensor) -> None:
    """Add ``grad [n, F, w]`` to where its values were taken from."""
    grad = grad.transpose(1, 2)
    inside = source >= 0
    dx.index_add_(0, source[inside], grad[inside])
    dhistory.index_add_(0, -1 - source[~inside], grad[~inside])
