"""Gated RMSNorm in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tensors import widened


def gated_rms_norm_fwd(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    value = widened(x)
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * rstd * widened(weight) * torch.nn.functional.silu(widened(gate))).to(x.dtype)


def gated_rms_norm_bwd(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    value, gate_up, dy = widened(x), widened(gate), widened(dy)
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    normed = value * rstd
    sigmoid = torch.sigmoid(gate_up)
    dgated = dy * normed
    dgate = dgated * widened(weight) * sigmoid * (1 + gate_up * (1 - sigmoid))
    silu = gate_up * sigmoid
    dweight = (dgated * silu).flatten(0, -2).sum(0)
    dnormed = dy * widened(weight) * silu
    dx = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), dgate.to(gate.dtype), dweight.to(weight.dtype)
