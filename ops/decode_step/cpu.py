"""The decode step in PyTorch, in place on the states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory_rule.rules import RULES
from ..route.cpu import route_fwd


def decode_step(
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
) -> Tensor:
    """Arguments as ``mom::decode_step_``; o ``[B, T, HV, V]``."""
    batch, tokens, key_size = q.shape
    total, value_heads, key_dim, value_dim = recurrent_state.shape[1:]
    heads, memories, kind = key_size // key_dim, total - int(shared), RULES[rule]
    dtype = torch.promote_types(torch.promote_types(q.dtype, recurrent_state.dtype), torch.float32)
    weights, memory, usable = _routing(router_logits, router_indices, router_weights, topk, memories)
    if shared:
        memory = F.pad(memory, (0, 1), value=memories)
        weights = F.pad(weights, (0, 1), value=1.0)
        usable = None if usable is None else F.pad(usable, (0, 1), value=True)
    if valid is not None:
        every = valid.unsqueeze(-1)
        usable = every.expand(memory.shape) if usable is None else usable & every
    group = torch.zeros_like(memory) if kv.shape[2] == 1 else memory
    row = torch.arange(batch, device=q.device).unsqueeze(1)
    decay: Tensor | None = None
    if kind.gate == "head":
        decay = 1 - torch.exp2(-5.0 - torch.arange(value_heads, dtype=dtype, device=q.device))
    outputs = []
    for t in range(tokens):
        pick, gate_row = memory[:, t], group[:, t]
        use = None if usable is None else usable[:, t]
        x = torch.cat([q[:, t].unsqueeze(1).expand(-1, pick.shape[1], -1), kv[row, t, gate_row]], 2).to(dtype)
        if conv_state is not None and conv_weight is not None:
            before = conv_state[row, pick]
            window = torch.cat([before.to(dtype), x.unsqueeze(-1)], 3)
            x = (window * conv_weight.to(dtype)).sum(3)
            _write(conv_state, row, pick, use, window[..., 1:].to(before.dtype))
        x = F.silu(x)
        qt, kt, v = x.split([key_size, key_size, value_heads * value_dim], 2)
        qt, kt = (_unit(torch.unflatten(part, 2, (heads, key_dim)), value_heads // heads) for part in (qt, kt))
        v = torch.unflatten(v, 2, (value_heads, value_dim))
        if a is not None and A_log is not None and dt_bias is not None:
            dt = F.softplus(a[row, t, gate_row].to(dtype) + dt_bias.to(dtype))
            decay = torch.exp(-A_log.to(dtype).exp() * dt)
            if rule == "mamba2":
                v = v * dt.unsqueeze(-1)
        state = recurrent_state[row, pick].to(dtype)
        # What was remembered is read before it is written: one pass over the state gives both products.
        keys = torch.stack([qt, kt], 3) if b is not None else qt.unsqueeze(3)
        if decay is not None:
            keys = keys * decay[..., None, None]
        products = keys @ state
        read = products[..., 0, :]
        if b is not None:
            v = b[row, t, gate_row].to(dtype).sigmoid().unsqueeze(-1) * (v - products[..., 1, :])
        read = scale * (read + (qt * kt).sum(-1, keepdim=True) * v)
        update = kt.unsqueeze(-1) * v.unsqueeze(-2)
        state = (
            update + state if decay is None else torch.addcmul(update, state, decay[..., None, None].expand_as(state))
        )
        _write(recurrent_state, row, pick, use, state.to(recurrent_state.dtype))
        weighted = read * weights[:, t, :, None, None].to(dtype)
        if use is not None:
            # where, not a product: what a skipped memory holds may be infinite.
            weighted = torch.where(use[..., None, None], weighted, 0)
        outputs.append(weighted.sum(1).to(q.dtype))
    if not outputs:
        return q.new_zeros(batch, tokens, value_heads, value_dim)
    o = torch.stack(outputs, 1)
    return o if norm_weight is None else _normed(o, norm_weight, gate, eps, dtype)


def _write(state: Tensor, row: Tensor, memory: Tensor, use: Tensor | None, value: Tensor) -> None:
    if use is None:
        state[row, memory] = value
        return
    chosen = use.nonzero()
    state[chosen[:, 0], memory[chosen[:, 0], chosen[:, 1]]] = value[chosen[:, 0], chosen[:, 1]]


def _normed(o: Tensor, norm_weight: Tensor, gate: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    value = o.to(dtype)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    if gate is not None:
        value = value * F.silu(gate.to(dtype).reshape(value.shape).contiguous())
    return value.to(o.dtype)


def _unit(x: Tensor, groups: int) -> Tensor:
    x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x if groups == 1 else x.repeat_interleave(groups, 2)


def _routing(
    logits: Tensor | None, indices: Tensor | None, weights: Tensor | None, topk: int, memories: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights, indices made safe, and which of them select a memory (None: all): ``[B, T, k]``."""
    if indices is None:
        assert logits is not None
        chosen, order = route_fwd(logits.flatten(0, 1), topk)
        shape = (*logits.shape[:2], topk)
        return chosen.view(shape), order.view(shape), None
    inside = (indices >= 0) & (indices < memories)
    earlier = torch.ones(topk, topk, dtype=torch.bool, device=indices.device).tril(-1)
    repeated = ((indices.unsqueeze(-1) == indices.unsqueeze(-2)) & earlier).any(-1)
    safe = torch.where(inside, indices, 0)
    if weights is None:
        assert logits is not None
        value = torch.where(inside, logits.gather(-1, safe), -torch.inf)
        weights = torch.softmax(value, -1)
    return weights, safe, inside & ~repeated
