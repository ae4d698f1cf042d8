"""The rows of q, k and v in float64, out of the references of their parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..permute.reference import permute_reference
from ..short_conv.reference import short_conv_reference


def conv_qkv_reference(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    slot_of: Tensor,
    entry_of: Tensor,
    segment_start: Tensor,
    segment_length: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q, k = l2(silu(conv(.)))`` per head and ``v = silu(conv(.))`` inside each segment; see :func:`conv_qkv`."""
    rows = torch.cat([permute_reference(q, slot_of, entry_of).double(), kv.double()], 1)
    y, final_state = short_conv_reference(rows, weight, initial_state, segment_start, segment_length, "silu")
    keys, values = y.split([2 * q.shape[1], y.shape[1] - 2 * q.shape[1]], 1)
    heads = keys.unflatten(1, (2, -1, head_dim))
    heads = heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    return heads[:, 0], heads[:, 1], values, final_state
