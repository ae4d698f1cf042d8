"""What only a GenAI artifact promises: ragged batches, generation in batches, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import Check, relative
from .stored_state import DECODE_ERRORS, ROUNDING, state_dtype_of
from .structure import ENGINE_PAGE
from .verification import MIN_COMPARED, compared_check, decided_tokens, greedy_check, random_tokens

if TYPE_CHECKING:
    from ..model import MoMForCausalLM
    from .genai_runner import GenaiRunner

RAGGED = (70, 1, 13, 64)  # lengths of the rows of a padded batch
ENGINE_STEPS = 40


def genai_checks(runner: Any, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """The rows of the report beyond those of every artifact."""
    checks = [*_ragged(runner, model, tolerance), _snapshot(runner, model)]
    return [*checks, *_engine(runner, model, tolerance)] if runner.has_engine else checks


def _ragged(runner: GenaiRunner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """Rows padded on the right in one batch, against each row alone: logits, states at the row's end, greedy text."""
    import torch

    ids = random_tokens(model.config.vocab_size, len(RAGGED), max(RAGGED), seed=300)
    mask = (np.arange(ids.shape[1]) < np.array(RAGGED)[:, None]).astype(np.int64)
    logits, state = runner.run_masked(ids, mask)
    errors, state_errors, used, whole = [], [0.0], [], []
    for row, length in enumerate(RAGGED):
        with torch.no_grad():
            out = model(torch.from_numpy(ids[row : row + 1, :length]))
        decided = min(length, int(decided_tokens(out.router_logits, model.config.topk)[0]))
        used.append(np.arange(length) < decided)
        errors.append(relative(logits[row, :decided], out.logits[0, :decided].numpy()))
        whole.append(decided == length)
        if whole[-1]:
            state_errors += [
                relative(state[layer][name][row], value[0].numpy())
                for layer, values in enumerate(out.state)
                for name, value in values.items()
            ]
    lengths = " ".join(map(str, RAGGED))
    allowed = tolerance + ROUNDING[state_dtype_of(runner.manifest)]
    return [
        compared_check("ragged batch, logits", max(errors), tolerance, np.concatenate(used), lengths),
        compared_check("ragged batch, states", max(state_errors), allowed, np.array(whole), "at the end of each row"),
    ]


def _engine(runner: GenaiRunner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """Requests of several lengths through the engine at once, as in :func:`greedy_check`.

    Two of them have a beginning in common that fills a page: what the engine knew of it would be no state.
    """
    prefix, *prompts = (
        random_tokens(model.config.vocab_size, 1, length, seed=310 + index)[0].tolist()
        for index, length in enumerate((ENGINE_PAGE[0] + 5, *RAGGED))
    )
    prompts += [[*prefix, *prompts[0][:3]], [*prefix, *prompts[0][5:]]]
    texts = runner.generate_requests(prompts, ENGINE_STEPS)
    allowed = tolerance + DECODE_ERRORS[state_dtype_of(runner.manifest)]
    checks = [greedy_check("", model, allowed, *pair) for pair in zip(prompts, texts, strict=True)]
    steps = sum(len(text) for text in texts)
    compared = sum(int(check.measured.split()[0]) for check in checks)
    passed = all(check.passed for check in checks) and compared >= MIN_COMPARED * steps
    note = "; ".join(f"request {index}: {check.note}" for index, check in enumerate(checks) if check.note)
    return [Check(f"engine, {len(prompts)} requests", None, passed, note, f"{compared} of {steps} tokens")]


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
