"""The memory rules as plain token recurrences in float64: what every implementation is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(g_t) S_{t-1} + k_t u_t^T``, ``o_t = scale S_t^T q_t``, one token after the other.

    ``u_t = v_t`` for the additive rules and ``beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)`` for the delta rules.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``, HV a multiple of H; value head ``h`` uses key head ``h // (HV / H)``.
        g: ``[B, T, HV]`` log decay (natural), or None.
        beta: ``[B, T, HV]``, or None.
        scale: factor of the read.
        initial_state: ``[B, HV, K, V]``, or None for zeros.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the final state ``[B, HV, K, V]``, both float64, differentiable.

    Source: MoM (arXiv 2502.13685) equations 2 to 5 with the rules of Table 1; Gated DeltaNet (arXiv 2412.06464) eq. 10.
    """
    q, k, v = q.double(), k.double(), v.double()
    groups = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    batch, length, heads, key_dim = k.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(length):
        if g is not None:
            state = state * g[:, t].double().exp()[..., None, None]
        update = v[:, t]
        if beta is not None:
            update = beta[:, t].double()[..., None] * (update - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], update)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return o, state


def segments_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`recurrence_reference` over every segment of the aligned row layout; rows ``[S, H, K]``, ``[S, HV, V]``."""
    o = v.double() * 0
    states = []
    for index, (start, length) in enumerate(zip(segment_start.tolist(), segment_length.tolist(), strict=True)):
        rows = slice(start, start + length)
        segment_o, state = recurrence_reference(
            q[None, rows],
            k[None, rows],
            v[None, rows],
            None if g is None else g[None, rows],
            None if beta is None else beta[None, rows],
            scale,
            None if initial_state is None else initial_state[index : index + 1],
        )
        o = torch.cat([o[:start], segment_o[0], o[start + length :]])
        states.append(state)
    return o, torch.cat(states)
