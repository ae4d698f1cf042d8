"""What only a GenAI artifact promises: ragged batches, generation in batches, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import Check, relative
from .verification import compared_check, decided_tokens, random_tokens

if TYPE_CHECKING:
    from ..model import MoMForCausalLM
    from .genai_runner import GenaiRunner

RAGGED = (70, 1, 13, 64)  # lengths of the rows of a padded batch


def genai_checks(runner: Any, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """The rows of the report beyond those of every artifact."""
    return [*_ragged(runner, model, tolerance), _snapshot(runner, model)]


def _ragged(runner: GenaiRunner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """Rows padded on the right in one batch, against each row alone: logits, states at the row's end, greedy text."""
    import torch

    ids = random_tokens(model.config.vocab_size, len(RAGGED), max(RAGGED), seed=300)
    mask = (np.arange(ids.shape[1]) < np.array(RAGGED)[:, None]).astype(np.int64)
    logits, state = runner.run_masked(ids, mask)
    errors, used = [], []
    for row, length in enumerate(RAGGED):
        with torch.no_grad():
            out = model(torch.from_numpy(ids[row : row + 1, :length]))
        decided = min(length, int(decided_tokens(out.router_logits, model.config.topk)[0]))
        used.append(np.arange(length) < decided)
        errors.append(relative(logits[row, :decided], out.logits[0, :decided].numpy()))
        if decided == length:
            errors += [
                relative(state[layer][name][row], value[0].numpy())
                for layer, values in enumerate(out.state)
                for name, value in values.items()
            ]
    lengths = " ".join(map(str, RAGGED))
    return [compared_check("ragged batch, logits and states", max(errors), tolerance, np.concatenate(used), lengths)]


def _snapshot(runner: GenaiRunner, model: MoMForCausalLM) -> Check:
    """GenAI: a snapshot after the prompt, tokens, a rewind to it, the same tokens again."""
    prompt = random_tokens(model.config.vocab_size, 1, 20, seed=301)[0].astype(np.int32)
    generator = runner.generator(1, len(prompt) + 40, do_sample=False)
    if not hasattr(generator, "snapshot_state"):
        return Check("snapshot and rewind", None, True, "not in this onnxruntime-genai")
    generator.append_tokens(prompt)
    generator.snapshot_state()

    def tokens() -> tuple[list[int], Any]:
        generator.append_tokens(prompt[:7])
        return prompt[:7].tolist(), np.array(generator.get_logits())

    _, first = tokens()
    generator.rewind_to(len(prompt))
    _, second = tokens()
    return Check("snapshot and rewind", None, bool(np.array_equal(first, second)))
