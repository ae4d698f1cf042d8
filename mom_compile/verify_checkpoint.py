"""Checks of a checkpoint folder: its files open, its weights are finite, and the forms of the model agree on it."""

from __future__ import annotations

import os

import torch

from .model import MoMForCausalLM, MoMOutput
from .report import Check, Report, relative

TOLERANCE = 1e-4
LENGTH = 130  # crosses two chunk boundaries


def verify_checkpoint(directory: str | os.PathLike[str], tolerance: float | None = None) -> Report:
    """Open a checkpoint folder and compare the packed, portable and step forms in float32 on random tokens.

    Raises:
        ValueError: a missing, truncated or mismatched file.
    """
    tolerance = TOLERANCE if tolerance is None else tolerance
    model = MoMForCausalLM.from_pretrained(directory).float()
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    checks = [Check("weights are finite", None, not bad, ", ".join(bad[:3]))]
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model(ids, form="packed")
        # The packed form's routing is given to the others: on a tie of rounding they may rightly choose differently.
        indices = [logits.topk(model.config.topk, -1).indices for logits in packed.router_logits]
        packed = model(ids, form="packed", router_indices=indices)
        portable = model(ids, form="portable", router_indices=indices)
        checks.append(_compare("portable form against packed", portable, packed, tolerance))
        steps, state = [], None
        for t in range(LENGTH):
            part = [x[:, t : t + 1] for x in indices]
            out = model(ids[:, t : t + 1], state=state, form="step", router_indices=part)
            steps.append(out.logits)
            state = out.state
        stepped = packed._replace(logits=torch.cat(steps, 1), state=state)
        checks.append(_compare("one token at a time against packed", stepped, packed, tolerance))
    return Report("checkpoint", tolerance, tuple(checks))


def _compare(name: str, actual: MoMOutput, expected: MoMOutput, tolerance: float) -> Check:
    assert actual.logits is not None and expected.logits is not None
    pairs = [(actual.logits, expected.logits)]
    for a, e in zip(actual.state, expected.state, strict=True):
        pairs += [(a[key], e[key]) for key in e]
    error = max(relative(a.numpy(), e.numpy()) for a, e in pairs)
    return Check(name, error, error <= tolerance, f"2x{LENGTH} tokens, logits and states")
