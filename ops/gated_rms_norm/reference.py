"""Gated RMSNorm in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x rsqrt(mean x^2 + eps) weight SiLU(gate)`` over the last axis, float64."""
    x, gate, weight = x.double(), gate.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * gate * torch.sigmoid(gate)
