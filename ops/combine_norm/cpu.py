"""Combine and gated RMSNorm in PyTorch, out of the implementations of the two."""

from __future__ import annotations

from torch import Tensor

from .._tensors import widened
from ..combine.cpu import combine_bwd, combine_fwd
from ..gated_rms_norm.cpu import gated_rms_norm_bwd, gated_rms_norm_fwd


def combine_norm_fwd(
    o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor, gate: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    combined = combine_fwd(widened(o), weights, slot_of, entry_of)
    return gated_rms_norm_fwd(combined, gate, norm_weight, eps).to(o.dtype)


def combine_norm_bwd(
    dy: Tensor,
    o: Tensor,
    weights: Tensor,
    slot_of: Tensor,
    entry_of: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = widened(o)
    combined = combine_fwd(wide, weights, slot_of, entry_of)
    dcombined, dgate, dnorm_weight = gated_rms_norm_bwd(dy, combined, gate, norm_weight, eps)
    do, dweights = combine_bwd(dcombined, wide, weights, slot_of, entry_of)
    return do.to(o.dtype), dweights, dgate, dnorm_weight
