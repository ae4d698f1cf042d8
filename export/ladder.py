"""All artifacts of one checkpoint held to it together: each on its own, then one conversation through all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..report import Check, Report, relative
from .artifact import update_manifest
from .runner import Runner, State, load
from .verification import compared_check, decided_tokens, is_float32, random_tokens, state_arrays, verify

if TYPE_CHECKING:
    from ..model import MoMForCausalLM
    from .text_verification import HeldOut

# The order in which a conversation goes on, by target, then by kind; what is not named comes last.
ORDER = ("onnxruntime", "portable", "opset27", "genai", "pt2", "aoti")
PIECE = 33  # one decode step, then a prefill of 32


def verify_all(
    directories: Sequence[str | os.PathLike[str]],
    model: MoMForCausalLM,
    *,
    tolerance: float | None = None,
    text: HeldOut | None = None,
    compiled: bool = True,
) -> dict[str, Report]:
    """Verify the artifacts of one checkpoint; each manifest keeps its report.

    Args:
        directories: artifact folders.
        model: the checkpoint they were exported from.
        tolerance: relative; None takes each manifest's.
        text: a held-out text whose bits per byte are compared as well.
        compiled: let ``torch.compile`` of the model take part in the conversation.

    Returns:
        A report per folder. The conversation through the float32 artifacts is a row of every one that took part.

    Raises:
        ValueError: a damaged folder, or one of another model.
    """
    reports = {str(folder): verify(folder, model, tolerance, text, speed=True) for folder in directories}
    runners = {folder: load(folder) for folder in reports}
    able = [name for name in runners if is_float32(runners[name]) and runners[name].why_not() is None]
    exact = sorted(able, key=lambda name: _rank(runners[name]))
    if exact:
        limit = max(reports[name].tolerance for name in exact)
        check = converse([runners[name] for name in exact], model, limit, compiled)
        for name in exact:
            reports[name] = replace(reports[name], checks=(*reports[name].checks, check))
    for name, report in reports.items():
        try:
            update_manifest(Path(name), parity=report.to_dict())
        except OSError as error:
            warnings.warn(f"the report was not written into {name}: {error}", stacklevel=2)
    return reports


def _rank(runner: Runner) -> int:
    kind = runner.manifest["kind"]
    name = runner.manifest["target"] if kind == "onnx" else kind
    return ORDER.index(name) if name in ORDER else len(ORDER)


def converse(runners: Sequence[Runner], model: MoMForCausalLM, tolerance: float, compiled: bool = True) -> Check:
    """One conversation that the model begins eagerly, the compiled model continues, then every runner in turn.

    Each goes on from the state of the one before; the logits are compared with one pass of the model.
    """
    speakers: list[Any] = [_Model(model)]
    names = ["eager"]
    if compiled:
        speakers.append(_Model(torch.compile(model, dynamic=True)))
        names.append("compiled")
    speakers += runners
    names += [runner.manifest["kind" if runner.manifest["kind"] != "onnx" else "target"] for runner in runners]
    ids = random_tokens(model.config.vocab_size, 2, PIECE * len(speakers), seed=400)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    pieces, state = [], None
    for speaker, start in zip(speakers, range(0, ids.shape[1], PIECE), strict=True):
        for part in (ids[:, start : start + 1], ids[:, start + 1 : start + PIECE]):
            logits, state = speaker(part, state)
            pieces.append(np.asarray(logits))
            state = state_arrays(state)
    use = np.arange(ids.shape[1])[None] < decided_tokens(out.router_logits, model.config.topk)[:, None]
    error = relative(np.concatenate(pieces, 1)[use], out.logits.numpy()[use])
    return compared_check("one conversation through all of them", error, tolerance, use, ", ".join(names))


class _Model:
    """A model, compiled or not, called as a runner is."""

    def __init__(self, call: Any) -> None:
        self.call = call

    @torch.no_grad()
    def __call__(self, ids: Any, state: Sequence[Mapping[str, Any]] | None) -> tuple[Any, State]:
        if state is not None:
            state = tuple({name: torch.from_numpy(value) for name, value in layer.items()} for layer in state)
        out = self.call(torch.from_numpy(ids), state=state)
        return out.logits, out.state
