"""The decode step written out per sequence, token and memory, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..memory_rule.reference import recurrence_reference
from ..memory_rule.rules import RULES
from ..route.reference import route_reference


def decode_step_reference(
    q: Tensor,
    kv: Tensor,
    router_logits: Tensor | None,
    router_indices: Tensor | None,
    router_weights: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weight: Tensor | None,
    recurrent_state: Tensor,
    conv_state: Tensor | None,
    valid: Tensor | None,
    rule: str,
    topk: int,
    shared: bool,
    scale: float,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer's equations one after the other.

    Args:
        q, kv, router_logits, router_indices, router_weights, a, b, A_log, dt_bias, conv_weight, recurrent_state, \
conv_state, valid, rule, topk, shared, scale, norm_weight, gate, eps: as for ``mom::decode_step``.

    Returns:
        ``o`` ``[B, T, HV, V]``, the new recurrent and convolution states (or None), float64.

    Source: MoM (arXiv 2502.13685) section 3.2.
    """
    batch, tokens, key_size = q.shape
    total, value_heads, key_dim, value_dim = recurrent_state.shape[1:]
    memories = total - int(shared)
    state = recurrent_state.double().clone()
    window = None if conv_state is None else conv_state.double().clone()
    o = torch.zeros(batch, tokens, value_heads, value_dim, dtype=torch.float64, device=q.device)
    for n in range(batch):
        for t in range(tokens):
            if valid is not None and not valid[n, t]:
                continue
            for memory, weight in _selected(
                router_logits, router_indices, router_weights, n, t, topk, memories, shared
            ):
                group = 0 if kv.shape[2] == 1 else memory
                x = torch.cat([q[n, t], kv[n, t, group]]).double()
                if window is not None and conv_weight is not None:
                    inputs = torch.cat([window[n, memory], x.unsqueeze(1)], 1)
                    window[n, memory] = inputs[:, 1:]
                    x = (inputs * conv_weight.double()).sum(1)
                x = x * torch.sigmoid(x)
                qt, kt = (part.view(1, 1, -1, key_dim) for part in (x[:key_size], x[key_size : 2 * key_size]))
                qt, kt = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (qt, kt))
                v = x[2 * key_size :].view(1, 1, value_heads, value_dim)
                g: Tensor | None = None
                if RULES[rule].gate == "head":
                    g = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(value_heads)], device=q.device)
                    g = g.double()
                elif a is not None and A_log is not None and dt_bias is not None:
                    dt = torch.nn.functional.softplus(a[n, t, group].double() + dt_bias.double())
                    g = -A_log.double().exp() * dt
                    if rule == "mamba2":
                        v = v * dt.unsqueeze(-1)
                beta = None if b is None else b[n, t, group].double().sigmoid().view(1, 1, -1)
                decay = None if g is None else g.view(1, 1, -1)
                read, after = recurrence_reference(qt, kt, v, decay, beta, scale, state[n, memory].unsqueeze(0))
                state[n, memory] = after[0]
                o[n, t] += weight * read[0, 0]
    if norm_weight is not None:
        o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
        if gate is not None:
            o = o * torch.nn.functional.silu(gate.double()).view_as(o)
    return o, state, window


def _selected(
    logits: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    n: int,
    t: int,
    topk: int,
    memories: int,
    shared: bool,
) -> list[tuple[int, float]]:
    if indices is None:
        assert logits is not None
        chosen, order = route_reference(logits[n, t : t + 1], topk)
        pairs = list(zip(order[0].tolist(), chosen[0].tolist(), strict=True))
    else:
        picked = indices[n, t].tolist()
        if weights is not None:
            share = weights[n, t].tolist()
        else:
            assert logits is not None
            row = logits[n, t].double()
            values = [row[m].item() if 0 <= m < memories else -math.inf for m in picked]
            share = torch.tensor(values, dtype=torch.float64, device="cpu").softmax(0).tolist()
        pairs = [(m, w) for i, (m, w) in enumerate(zip(picked, share, strict=True)) if m not in picked[:i]]
        pairs = [(m, w) for m, w in pairs if 0 <= m < memories]
    return pairs + ([(memories, 1.0)] if shared else [])
