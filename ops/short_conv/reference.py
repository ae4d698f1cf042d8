"""The short convolution segment by segment, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(sum_i weight[:, i] x_{t - (W-1) + i})`` inside each segment of the aligned rows.

    Args:
        x: ``[S, F]``.
        weight: ``[F, W]``.
        initial_state: ``[NS, F, W-1]`` inputs before each segment, oldest first, or None for zeros.
        segment_start, segment_length: ``[NS]``.
        activation: ``silu`` or ``none``.

    Returns:
        y ``[S, F]`` (zero on pad rows) and the final state ``[NS, F, W-1]``, both float64.
    """
    x, weight = x.double(), weight.double()
    width = weight.shape[1]
    y = x * 0
    states = []
    for index, (start, length) in enumerate(zip(segment_start.tolist(), segment_length.tolist(), strict=True)):
        if initial_state is None:
            history = x.new_zeros(x.shape[1], width - 1)
        else:
            history = initial_state[index].double()
        padded = torch.cat([history, x[start : start + length].t()], 1)  # [F, W-1 + length]
        if length:
            out = (padded.unfold(1, width, 1) * weight.unsqueeze(1)).sum(-1).t()
            out = torch.nn.functional.silu(out) if activation == "silu" else out
            y = torch.cat([y[:start], out, y[start + length :]])
        states.append(padded[:, padded.shape[1] - (width - 1) :])
    return y, torch.stack(states)
