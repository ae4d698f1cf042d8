"""AdamW with the usual exemptions from weight decay, and the learning rate's course."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: parameters that decay, and those that do not.

    No decay for vectors (norms, A_log, dt_bias), embeddings, and the short convolutions, whose few taps are no matrix.

    Returns:
        Groups with ``params``, ``names`` and ``weight_decay``; a tied weight appears once.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay: dict[str, nn.Parameter] = {}
    keep: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.dim() < 2 or id(parameter) in embeddings or name.endswith("conv1d")
        (keep if exempt else decay)[name] = parameter
    return [
        {"params": list(group.values()), "names": list(group), "weight_decay": value}
        for group, value in ((decay, weight_decay), (keep, 0.0))
        if group
    ]


def make_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, as one fused update."""
    groups = [
        {key: value for key, value in group.items() if key != "names"}
        for group in parameter_groups(model, weight_decay)
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def learning_rate_at(step: int, progress: float, peak: float, warmup_steps: int, final_ratio: float) -> float:
    """Linear warm-up, then half a cosine down to ``peak * final_ratio``.

    Args:
        step: from 0.
        progress: share of the run that is done, in [0, 1]; beyond 1 counts as 1.
        peak: the highest rate.
        warmup_steps: steps until the rate is no longer scaled down; 0 for none.
        final_ratio: in [0, 1].
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return peak * warm * (final_ratio + (1 - final_ratio) * cosine)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm`` (0: leave them); returns the norm before.

    A norm that is not finite leaves the gradients as they are: the caller stops.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
