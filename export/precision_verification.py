"""Below float32: the logits on the model's own routing, and how often a free artifact chooses as the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..report import Check, relative
from .precision import ROUTING_AGREEMENT, ROUTING_MARGIN, TOLERANCES
from .stored_state import DECODE_ERRORS, state_dtype_of
from .verification import DECODE_STEPS, PREFILL_SHAPES, precision_of, prefill_checks, random_tokens

if TYPE_CHECKING:
    from ..model import MoMForCausalLM
    from .text_verification import HeldOut

FREE_TOKENS = 512  # tokens of a text over which the free choices are compared
PROMPT = 41  # the steps cross position 64
Draw = Callable[[int, int, int], NDArray[np.int64]]


def precision_checks(runner: Any, model: MoMForCausalLM, tolerance: float, text: HeldOut | None = None) -> list[Check]:
    """The rows of the report for an ONNX artifact below float32, on the text, or on random tokens where there is none.

    What a trained model makes of random tokens is noise, and rounding shows in it more than in a text. Where the states
    alone are of 16 bits, one call is as exact as in float32.
    """

    def draw(batch: int, length: int, seed: int) -> NDArray[np.int64]:
        return (
            random_tokens(model.config.vocab_size, batch, length, seed)
            if text is None
            else text.draw(batch, length, seed)
        )

    rounded = precision_of(runner) != "float32"
    return [
        *([_forced(runner, model, tolerance, draw)] if rounded else prefill_checks(runner, model, tolerance)),
        *_decode(runner, model, tolerance + DECODE_ERRORS[state_dtype_of(runner.manifest)], draw),
        _free(runner, model, tolerance, draw(1, 150 if text is None else FREE_TOKENS, 500)[0]),
    ]


def _chosen(model: MoMForCausalLM, router_logits: Any) -> list[NDArray[np.int64]]:
    """``[B, T, k]`` per layer."""
    from ..ops import route

    topk = model.config.topk
    return [route(logits.flatten(0, 1), topk)[1].view(*logits.shape[:2], topk).numpy() for logits in router_logits]


def _forced(runner: Any, model: MoMForCausalLM, tolerance: float, draw: Draw) -> Check:
    """Prefills of the graph that takes the routing, given that of the model."""
    import torch

    errors = []
    for seed, shape in enumerate(PREFILL_SHAPES):
        ids = draw(*shape, seed)
        with torch.no_grad():
            out = model(torch.from_numpy(ids))
        logits, _ = runner.run_forced(ids, _chosen(model, out.router_logits))
        errors.append(relative(logits, out.logits.numpy()))
    lengths = ", ".join(f"{batch}x{length}" for batch, length in PREFILL_SHAPES)
    return Check("prefill logits, the model's routing forced in", max(errors), max(errors) <= tolerance, lengths)


def _decode(runner: Any, model: MoMForCausalLM, tolerance: float, draw: Draw) -> list[Check]:
    """A prefill and decode steps on the artifact's own choices, which the model is given, in every way to keep a state.

    The choices show in the states, so the decode graph is compared without a graph that takes them.
    """
    import torch

    from ..memory_use import memory_use_of_runner

    length, topk = PROMPT + DECODE_STEPS, model.config.topk
    ids = draw(1, length, 501)
    use = memory_use_of_runner(runner, ids[0].tolist())
    name = f"{DECODE_STEPS} decode steps with the same routing"
    if not (use.sum(2) == topk).all():
        return [Check(name, None, False, "a token changed another number of memories")]
    with torch.no_grad():
        indices = [torch.from_numpy(np.nonzero(layer)[1].reshape(1, length, topk)) for layer in use]
        out = model(torch.from_numpy(ids), router_indices=indices)
    whole, state = runner(ids[:, :PROMPT])
    checks = []
    for way, options in runner.decode_ways().items():
        step = runner.decode_loop(state, 1, **options)
        steps = [step(ids[:, t])[:, None].copy() for t in range(PROMPT, length)]
        error = relative(np.concatenate([np.asarray(whole), *steps], 1), out.logits.numpy())
        note = f"after a prefill of {PROMPT}"
        checks.append(Check(f"{name}{way and ', '}{way}", error, error <= tolerance, note))
    return checks


def _free(runner: Any, model: MoMForCausalLM, tolerance: float, ids: NDArray[np.int64]) -> Check:
    """Both run free over the same tokens: the share of choices in common, and the model's margin where they differ.

    Whoever asked for a larger tolerance than the precision's own is told, and held to nothing.
    """
    import torch

    from ..memory_use import memory_use_of_runner

    use = memory_use_of_runner(runner, ids.tolist())
    with torch.no_grad():
        out = model(torch.from_numpy(ids)[None])
    different, margin = 0, 0.0
    for layer, (logits, best) in enumerate(zip(out.router_logits, _chosen(model, out.router_logits), strict=True)):
        probability = torch.softmax(logits[0], -1).numpy()
        for t, chosen in enumerate(use[layer]):
            missing = [m for m in best[0, t] if not chosen[m]]
            others = [m for m in np.flatnonzero(chosen) if m not in best[0, t]]
            different += len(missing)
            if missing and others:
                margin = max(margin, float(probability[t, missing].max() - probability[t, others].min()))
    agreement = 1 - different / use.sum()
    required = tolerance <= TOLERANCES[precision_of(runner)]
    passed = not required or (agreement >= ROUTING_AGREEMENT and margin < ROUTING_MARGIN)
    limits = f"{ROUTING_AGREEMENT:.1%} and {ROUTING_MARGIN:g} allowed"
    note = (
        f"{different} of {use.sum()} choices differ, largest margin {margin:.1e}; "
        f"{limits if required else f'nothing required at a tolerance of {tolerance:g}'}"
    )
    return Check("free routing agrees", None, bool(passed), note, f"{agreement:.2%}")
