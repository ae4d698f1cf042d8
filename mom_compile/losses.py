"""Cross entropy of the next token and the balance loss of the router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import route

IGNORE = -100


def next_token_targets(
    labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """What each position predicts: ``labels[:, t + 1]``, or -100 where nothing counts.

    Args:
        labels: ``[B, T]`` int64; -100 is ignored.
        attention_mask: ``[B, T]``; targets on padding, and those that padding would predict, are ignored.
        cu_seqlens: ``[N+1]``; the first token of a document is no target.

    Returns:
        ``[B, T]`` int64.
    """
    targets = labels.new_full(labels.shape, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        real = attention_mask.to(torch.bool)
        both = torch.zeros_like(real)
        both[:, :-1] = real[:, :-1] & real[:, 1:]
        targets = targets.masked_fill(~both, IGNORE)
    if cu_seqlens is not None:
        position = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        starts = (position.unsqueeze(1) == cu_seqlens).any(1)
        targets = targets.masked_fill(starts, IGNORE)
    return targets


def next_token_loss(
    logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean cross entropy in nats of :func:`next_token_targets` under ``logits``.

    Args:
        logits: ``[B, T, vocab_size]``.
        labels, attention_mask, cu_seqlens: as there.

    Returns:
        A float32 scalar (float64 for float64 logits); 0 where no target counts.
    """
    targets = next_token_targets(labels, attention_mask, cu_seqlens)
    flat = logits.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def balance_loss(router_logits: Sequence[Tensor], topk: int, attention_mask: Tensor | None = None) -> Tensor:
    """``M sum_j sum_m f_jm P_m`` over the tokens of all layers, padding excluded.

    f_jm is the share of tokens whose choice j is memory m, P_m the mean router probability of m; k for uniform routing.

    Args:
        router_logits: per layer ``[B, T, M]`` float32.
        topk: k.
        attention_mask: ``[B, T]``, 0 for padding.

    Source: Switch Transformer (arXiv 2101.03961) equations 4 to 6, as in Mixtral's implementation.
    """
    if not router_logits:
        return torch.zeros(())
    logits = torch.stack(list(router_logits)).flatten(1, 2)  # [L, T, M]
    memories = logits.shape[-1]
    probability = torch.softmax(logits, -1)
    with torch.no_grad():
        indices = route(logits.detach(), topk)[1]
        chosen = (indices.unsqueeze(-1) == torch.arange(memories, device=logits.device)).to(probability.dtype)
    if attention_mask is None:
        share, mean = chosen.mean((0, 1)), probability.mean((0, 1))
    else:
        weight = attention_mask.to(probability.dtype).flatten()
        total = weight.sum().clamp(min=1) * logits.shape[0]
        share = (chosen * weight[:, None, None]).sum((0, 1)) / total
        mean = (probability * weight[:, None]).sum((0, 1)) / total
    return memories * (share * mean).sum()
