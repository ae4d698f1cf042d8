"""Holding an artifact to the model it came from: structure, logits, states, greedy text."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import MoMConfig
from ..report import Check, Report, relative
from .artifact import read_manifest
from .runner import Runner, State, load
from .stored_state import ROUNDING, state_dtype_of

if TYPE_CHECKING:
    from ..model import MoMForCausalLM
    from .text_verification import HeldOut

REFERENCE_FILE = "reference.npz"
REFERENCE_LOGITS = 256  # vocabulary entries kept per position
DECODE_STEPS = 64
GREEDY_STEPS = 256
# (batch, length): off the exported example's length, around chunk boundaries, and one token.
PREFILL_SHAPES = ((1, 1), (3, 7), (2, 63), (2, 64), (1, 65), (2, 130), (1, 200))
ROUTING_MARGIN = 1e-5  # below it two float32 implementations may rightly choose different memories
MIN_COMPARED = 0.5  # share of the tokens that a check must have compared


def verify(
    directory: str | os.PathLike[str],
    model: MoMForCausalLM | None = None,
    tolerance: float | None = None,
    text: HeldOut | None = None,
    speed: bool = False,
) -> Report:
    """Verify an artifact folder.

    Args:
        directory: written by a ``to_*`` function.
        model: what it was exported from; compared over many lengths, 64 decode steps and 256 tokens of greedy text;
            below float32 with the routing forced in and running free. None: the folder's own recorded reference is
            used, which needs no torch.
        tolerance: relative; None takes the manifest's.
        text: with a model, a held-out text whose bits per byte are compared as well.
        speed: with a model, time both.

    Raises:
        ValueError: a damaged or edited folder, or a model of another configuration.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    tolerance = manifest["tolerance"] if tolerance is None else tolerance
    if model is not None:
        expected = MoMConfig.from_dict(manifest["config"])
        if model.config != expected:
            raise ValueError(
                f"model must have the configuration in {folder / 'manifest.json'}, got {model.config}; "
                "pass the checkpoint that was exported"
            )
    return verify_folder(folder, model, tolerance, text, speed)


def verify_folder(
    folder: Path,
    model: MoMForCausalLM | None,
    tolerance: float,
    text: HeldOut | None = None,
    speed: bool = False,
) -> Report:
    """:func:`verify` without the comparison of configurations."""
    runner = _open(folder)
    if reason := runner.why_not():
        checks = [_structure(runner), Check("not run on this machine", None, True, reason)]
        return Report(f"{runner.manifest['target']} artifact", tolerance, tuple(checks))
    checks = [_structure(runner), _recorded(folder, runner, tolerance)]
    checks += [Check(f"{part}, not run on this machine", None, True, why) for part, why in runner.not_run().items()]
    if model is not None:
        if is_float32(runner):
            checks += _against_model(runner, model, tolerance)
        else:
            from .precision_verification import precision_checks

            checks += precision_checks(runner, model, tolerance, text)
        if runner.manifest["kind"] == "genai":
            from .genai_verification import genai_checks

            checks += genai_checks(runner, model, tolerance)
        if text is not None:
            from .text_verification import bits_per_byte_check

            checks.append(bits_per_byte_check(runner, text))
        if speed:
            from .text_verification import speed_checks

            checks += speed_checks(runner, model)
    return Report(f"{runner.manifest['target']} artifact", tolerance, tuple(checks))


def _open(folder: Path) -> Runner:
    """The folder's runner; for TensorRT the graphs that the engines were built from, in onnxruntime on the CPU."""
    if read_manifest(folder)["kind"] == "tensorrt":
        return load(folder, providers=["CPUExecutionProvider"])
    return load(folder)


def _structure(runner: Runner) -> Check:
    try:
        runner.check_structure()
    except ValueError as error:
        return Check("structure and operators", None, False, str(error))
    return Check("structure and operators", None, True)


# ---- the recorded reference ------------------------------------------------------------------------------------------


def random_tokens(vocab_size: int, batch: int, length: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length))


def record_reference(
    model: MoMForCausalLM, folder: Path, precision: str = "float32", text: HeldOut | None = None
) -> None:
    """Write a small file of tokens, the model's logits and its routing: ``verify`` without the checkpoint compares.

    Below float32 the tokens are those of the text, where there is one.
    """
    import torch

    from ..ops import route

    ids, topk = random_tokens(model.config.vocab_size, 2, 150, seed=1), model.config.topk
    if text is not None and precision != "float32":
        ids = text.draw(2, 150, seed=1)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    arrays: dict[str, Any] = {"ids": ids, "positions": np.array([0, 62, 63, 64, 65, 127, 128, 148, 149])}
    arrays["logits"] = out.logits.numpy()[..., :REFERENCE_LOGITS].astype(np.float32)[:, arrays["positions"]]
    arrays["decided"] = decided_tokens(out.router_logits, topk)
    if precision != "float32":
        chosen = [route(logits.flatten(0, 1), topk)[1].view(*ids.shape, topk) for logits in out.router_logits]
        arrays["router_indices"] = torch.stack(chosen).numpy()
    np.savez(folder / REFERENCE_FILE, **arrays)


def _recorded(folder: Path, runner: Runner, tolerance: float) -> Check:
    with np.load(folder / REFERENCE_FILE, allow_pickle=False) as file:
        ids, positions, expected, decided = (file[name] for name in ("ids", "positions", "logits", "decided"))
        forced = list(file["router_indices"]) if precision_of(runner) != "float32" else None
    name = "logits against the recorded reference"
    if forced is not None:
        logits, _ = runner.run_forced(ids, forced)  # type: ignore[attr-defined]
        error = relative(logits[:, positions, : expected.shape[2]], expected)
        return Check(name, error, error <= tolerance, "with its routing")
    # Two decode steps after a prefill, then the rest as a second prefill; one piece where the state between is rounded.
    cuts = (0, 100, 101, 102, ids.shape[1]) if is_float32(runner) else (0, ids.shape[1])
    pieces, state = [], None
    for start, stop in itertools.pairwise(cuts):
        logits, state = runner(ids[:, start:stop], state)
        pieces.append(np.asarray(logits))
    actual = np.concatenate(pieces, 1)[:, positions, : expected.shape[2]]
    use = positions[None] < decided[:, None]
    return compared_check(name, relative(actual[use], expected[use]), tolerance, use)


def precision_of(runner: Runner) -> str:
    """``float32``, or what the weights were rounded to."""
    return str(runner.manifest.get("precision", "float32"))


def is_float32(runner: Runner) -> bool:
    """Whether weights, activations and states are."""
    return precision_of(runner) == state_dtype_of(runner.manifest) == "float32"


# ---- against the model -----------------------------------------------------------------------------------------------


def decided_tokens(router_logits: Sequence[Any], topk: int) -> NDArray[np.int64]:
    """``[B]``: tokens of each row before the first whose routing hangs on less than 1e-5.

    An exact tie is decided: it goes to the lowest index everywhere.
    """
    import torch

    margins = []
    for logits in router_logits:
        if topk < logits.shape[-1]:
            ordered = logits.detach().float().sort(-1, descending=True).values
            margins.append(ordered[..., topk - 1] - ordered[..., topk])
    if not margins:
        shape = router_logits[0].shape if router_logits else (1, 1 << 30)
        return np.full(shape[0], 1 << 30)
    margin = torch.stack(margins)
    close = ((margin < ROUTING_MARGIN) & (margin > 0)).any(0)  # [B, T]
    first = torch.where(close.any(1), close.int().argmax(1), 1 << 30)
    return first.numpy()


def state_arrays(state: Any) -> State:
    """In float32."""
    return tuple({name: np.asarray(value).astype(np.float32) for name, value in layer.items()} for layer in state)


def _random_state(runner: Runner, batch: int, seed: int) -> State:
    """Values that the runner's dtypes have."""
    generator = np.random.default_rng(seed)
    values = tuple(
        {
            name: (0.1 * generator.standard_normal(tuple(value.shape))).astype(np.float32)
            for name, value in layer.items()
        }
        for layer in runner.init_state(batch)
    )
    return state_arrays(runner._check_state(batch, values))


def _compare(
    runner: Runner, model: MoMForCausalLM, batch: int, length: int, seed: int
) -> tuple[float, float, NDArray[np.bool_]]:
    """Relative errors of the logits and of the states of one prefill from a random state, and the tokens compared."""
    import torch

    ids = random_tokens(model.config.vocab_size, batch, length, seed)
    start = _random_state(runner, batch, seed)
    with torch.no_grad():
        out = model(
            torch.from_numpy(ids),
            state=tuple({name: torch.from_numpy(value) for name, value in layer.items()} for layer in start),
        )
    logits, present = runner(ids, start)
    logits, state = np.asarray(logits), state_arrays(present)
    decided = decided_tokens(out.router_logits, model.config.topk)
    use = np.arange(length)[None] < decided[:, None]
    whole = decided >= length
    expected = state_arrays(out.state)
    errors = [
        relative(state[layer][name][whole], expected[layer][name][whole])
        for layer in range(len(state))
        for name in state[layer]
    ]
    return relative(logits[use], out.logits.numpy()[use]), max(errors), use


def _against_model(runner: Runner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    checks = []
    for way, its_runner in runner.prefill_ways().items():
        checks += prefill_checks(its_runner, model, tolerance, way)
    return [*checks, *_decode(runner, model, tolerance), _greedy(runner, model, tolerance)]


def prefill_checks(runner: Runner, model: MoMForCausalLM, tolerance: float, way: str = "") -> list[Check]:
    """One call from a random state; a state of 16 bits is rounded once, when it comes out."""
    results = [_compare(runner, model, *shape, seed=seed) for seed, shape in enumerate(PREFILL_SHAPES)]
    runner.close()  # each graph maps the weights for itself
    suffix = way and f", {way}"
    compared = np.concatenate([use.ravel() for *_, use in results])
    lengths = ", ".join(f"{batch}x{length}" for batch, length in PREFILL_SHAPES)
    logits, states = max(result[0] for result in results), max(result[1] for result in results)
    rounding = ROUNDING[state_dtype_of(runner.manifest)]
    return [
        compared_check(f"prefill logits{suffix}", logits, tolerance, compared, lengths),
        compared_check(f"prefill states{suffix}", states, tolerance + rounding, compared, "from random states"),
    ]


def compared_check(name: str, error: float, tolerance: float, compared: NDArray[np.bool_], note: str = "") -> Check:
    share = float(compared.mean())
    if share < 1:
        note = f"{note}; {share:.0%} of the tokens: the rest follow a routing that hangs on rounding".lstrip("; ")
    return Check(name, error, error <= tolerance and share >= MIN_COMPARED, note)


def _decode(runner: Runner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """Prefill, then 64 steps in each of the runner's ways to keep the state, against one pass of the model."""
    import torch

    prompt = 41  # the steps cross position 64
    ids = random_tokens(model.config.vocab_size, 2, prompt + DECODE_STEPS, seed=100)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    use = np.arange(prompt, ids.shape[1])[None] < decided_tokens(out.router_logits, model.config.topk)[:, None]
    expected = out.logits[:, prompt:].numpy()[use]
    _, state = runner(ids[:, :prompt])
    checks = []
    for way, options in runner.decode_ways().items():
        step = runner.decode_loop(state, 2, **options)
        logits = np.stack([step(ids[:, t]).copy() for t in range(prompt, ids.shape[1])], 1)
        name = f"{DECODE_STEPS} decode steps{way and ', '}{way}"
        checks.append(compared_check(name, relative(logits[use], expected), tolerance, use))
        del step
        runner.close()
    return checks


def _greedy(runner: Runner, model: MoMForCausalLM, tolerance: float) -> Check:
    """The artifact's greedy text, see :func:`greedy_check`."""
    prompt = random_tokens(model.config.vocab_size, 1, 20, seed=200)
    eos = None if runner.manifest["kind"] == "genai" else -1  # GenAI stops at its own
    text = np.stack(list(runner.generate(prompt, GREEDY_STEPS, eos_token_id=eos)), 1)
    return greedy_check("greedy text", model, tolerance, prompt[0].tolist(), text[0].tolist())


def greedy_check(
    name: str, model: MoMForCausalLM, tolerance: float, prompt: Sequence[int], text: Sequence[int]
) -> Check:
    """At every step of a text the model, given the same tokens, chooses the same one.

    Steps whose two best logits are closer than the tolerance may differ; the first of them is printed. A routing that
    hangs on rounding ends the comparison.
    """
    import torch

    with torch.no_grad():
        out = model(torch.tensor([[*prompt, *text[:-1]]]))
    logits = out.logits[0, len(prompt) - 1 :]
    best = logits.topk(min(2, logits.shape[-1]), -1)
    margin, smallest = best.values[:, 0] - best.values[:, -1], tolerance * logits.norm(dim=-1) / logits.shape[-1] ** 0.5
    close = (margin < smallest).numpy()
    steps = min(len(text), max(0, int(decided_tokens(out.router_logits, model.config.topk)[0]) - len(prompt) + 1))
    equal = (best.indices[:, 0].numpy() == np.array(text)) | close
    note = "" if steps == len(text) else f"a routing hangs on rounding at token {steps}"
    if close[:steps].any():
        first = int(close.argmax())
        note = f"{note}; token {first} hangs on a margin of {float(margin[first]):.1e}".lstrip("; ")
    return Check(name, None, bool(equal[:steps].all()), note, f"{steps} tokens")
