"""The rows of q, k and v in PyTorch, out of the implementations of their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..permute.cpu import permute_fwd
from ..short_conv.cpu import short_conv_bwd, short_conv_fwd

EPS = 1e-6


def _convolved(q: Tensor, kv: Tensor, weight: Tensor, state: Tensor | None, tables: tuple[Tensor, ...]) -> Any:
    """The convolved rows ``[S, F]``, their inputs and the final state."""
    slot_of, entry_of, *segments = tables
    rows = torch.cat([permute_fwd(q, slot_of, entry_of), kv], 1)
    start, length, chunk = segments
    y, final_state = short_conv_fwd(rows, weight, state, start, length, chunk, "silu")
    return y, rows, final_state


def _heads(y: Tensor, key_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """q and k ``[S, 2, H, K]`` with their inverse norms, at least float32."""
    value = y[:, : 2 * key_size].unflatten(1, (2, key_size // head_dim, head_dim))
    value = value if y.dtype == torch.float64 else value.float()
    return value, torch.rsqrt(value.square().sum(-1, keepdim=True) + EPS)


def conv_qkv_fwd(
    q: Tensor, kv: Tensor, weight: Tensor, initial_state: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tables, head_dim = rest
    y, _, final_state = _convolved(q, kv, weight, initial_state, tuple(tables))
    value, rstd = _heads(y, q.shape[1], head_dim)
    heads = (value * rstd).to(y.dtype)
    return heads[:, 0].contiguous(), heads[:, 1].contiguous(), y[:, 2 * q.shape[1] :].contiguous(), final_state


def conv_qkv_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tables, head_dim = rest
    y, rows, _ = _convolved(q, kv, weight, initial_state, tuple(tables))
    value, rstd = _heads(y, q.shape[1], head_dim)
    grad, normed = torch.stack([dq, dk], 1).to(value.dtype), value * rstd
    grad = rstd * (grad - normed * (grad * normed).sum(-1, keepdim=True))
    dy = torch.cat([grad.flatten(1), dv.to(grad.dtype)], 1)
    start, length, chunk = tables[2:]
    dx, dweight, dinitial = short_conv_bwd(dy, dfinal_state, rows, weight, initial_state, start, length, chunk, "silu")
    return dx[:, : q.shape[1]].contiguous(), dx[:, q.shape[1] :].contiguous(), dweight, dinitial
