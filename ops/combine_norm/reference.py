"""The references of its two parts, one behind the other."""

from __future__ import annotations

from torch import Tensor

from ..combine.reference import combine_reference
from ..gated_rms_norm.reference import gated_rms_norm_reference


def combine_norm_reference(
    o: Tensor, weights: Tensor, slot_of: Tensor, entry_of: Tensor, gate: Tensor, norm_weight: Tensor, eps: float
) -> Tensor:
    """``RMSNorm(sum_j w_tj o[slot_tj]) * SiLU(gate)``, ``[T, HV, V]`` float64."""
    return gated_rms_norm_reference(combine_reference(o, weights, slot_of, entry_of), gate, norm_weight, eps)
