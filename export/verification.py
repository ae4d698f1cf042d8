"""Holding an artifact to the model it came from: structure, logits, states, greedy text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import MoMConfig
from ..report import Check, Report, relative
from .artifact import read_manifest
from .runner import Runner, State, load

if TYPE_CHECKING:
    from ..model import MoMForCausalLM

REFERENCE_FILE = "reference.npz"
REFERENCE_LOGITS = 256  # vocabulary entries kept per position
DECODE_STEPS = 64
# (batch, length): off the exported example's length, around chunk boundaries, and one token.
PREFILL_SHAPES = ((1, 1), (3, 7), (2, 63), (2, 64), (1, 65), (2, 130), (1, 200))
LOW_PRECISION_MARGIN = 1e-2
ROUTING_MARGIN = 1e-5  # below it two float32 implementations may rightly choose different memories
LOW_PRECISION_TOLERANCE = 2e-2
MIN_AGREEMENT = 0.995
MIN_COMPARED = 0.5  # share of the tokens that a check must have compared


def verify(
    directory: str | os.PathLike[str], model: MoMForCausalLM | None = None, tolerance: float | None = None
) -> Report:
    """Verify an artifact folder.

    Args:
        directory: written by a ``to_*`` function.
        model: what it was exported from; compared over many lengths, 64 decode steps and greedy text. None: the
            folder's own recorded reference is used, which needs no torch.
        tolerance: relative; None takes the manifest's.

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
    return verify_folder(folder, model, tolerance)


def verify_conversation(runners: Sequence[Runner], model: MoMForCausalLM, tolerance: float) -> Check:
    """One conversation that the model begins and every runner continues in turn, on the state of the one before."""
    import torch

    piece = 33  # one decode step, then a prefill of 32
    ids = random_tokens(model.config.vocab_size, 2, piece * (len(runners) + 1), seed=400)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
        state: Any = _state_arrays(model(torch.from_numpy(ids[:, :piece])).state)
    pieces = []
    for start, runner in zip(range(piece, ids.shape[1], piece), runners, strict=True):
        for part in (ids[:, start : start + 1], ids[:, start + 1 : start + piece]):
            logits, state = runner(part, state)
            pieces.append(np.asarray(logits))
    use = np.arange(piece, ids.shape[1])[None] < decided_tokens(out.router_logits, model.config.topk)[:, None]
    error = relative(np.concatenate(pieces, 1)[use], out.logits[:, piece:].numpy()[use])
    return compared_check("one conversation through all of them", error, tolerance, use, f"{len(runners)} artifacts")


def verify_folder(folder: Path, model: MoMForCausalLM | None, tolerance: float) -> Report:
    """:func:`verify` without the comparison of configurations."""
    runner = _open(folder)
    checks = [_structure(runner), _recorded(folder, runner, tolerance)]
    if model is not None and _precision(runner) != "float32":
        checks += _same_routing(runner, model, tolerance)
    elif model is not None:
        checks += _against_model(runner, model, tolerance)
        if runner.manifest["kind"] == "genai":
            from .genai_verification import genai_checks

            checks += genai_checks(runner, model, tolerance)
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


def record_reference(model: MoMForCausalLM, folder: Path, precision: str = "float32") -> None:
    """Write a small file of tokens and the model's logits: ``verify`` without the checkpoint compares with it."""
    import torch

    ids = random_tokens(model.config.vocab_size, 2, 150, seed=1)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    margin = ROUTING_MARGIN if precision == "float32" else LOW_PRECISION_MARGIN
    decided = decided_tokens(out.router_logits, model.config.topk, margin)
    logits = out.logits.numpy()[..., :REFERENCE_LOGITS].astype(np.float32)
    positions = np.array([0, 62, 63, 64, 65, 127, 128, 148, 149])
    np.savez(folder / REFERENCE_FILE, ids=ids, positions=positions, logits=logits[:, positions], decided=decided)


def _recorded(folder: Path, runner: Runner, tolerance: float) -> Check:
    with np.load(folder / REFERENCE_FILE, allow_pickle=False) as file:
        ids, positions, expected, decided = (file[name] for name in ("ids", "positions", "logits", "decided"))
    logits, state = runner(ids[:, :100])
    pieces = [np.asarray(logits)]
    for start in (100, 101, 102):  # two decode steps, then the rest as a second prefill
        stop = start + 1 if start < 102 else ids.shape[1]
        logits, state = runner(ids[:, start:stop], state)
        pieces.append(np.asarray(logits))
    actual = np.concatenate(pieces, 1)[:, positions, : expected.shape[2]]
    use = positions[None] < decided[:, None]
    error = relative(actual[use], expected[use])
    name = "logits against the recorded reference"
    if _precision(runner) != "float32":  # few tokens are decided there, and none may be
        return Check(name, error, error <= tolerance, f"{int(use.sum())} positions before the first close routing")
    return compared_check(name, error, tolerance, use)


def _precision(runner: Runner) -> str:
    return str(runner.manifest.get("precision", "float32"))


# ---- against the model -----------------------------------------------------------------------------------------------


def decided_tokens(
    router_logits: Sequence[Any], topk: int, smallest_margin: float = ROUTING_MARGIN
) -> NDArray[np.int64]:
    """``[B]``: tokens of each row before the first whose routing hangs on less than ``smallest_margin``.

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
    close = ((margin < smallest_margin) & (margin > 0)).any(0)  # [B, T]
    first = torch.where(close.any(1), close.int().argmax(1), 1 << 30)
    return first.numpy()


def _state_arrays(state: Any) -> State:
    return tuple({name: np.asarray(value) for name, value in layer.items()} for layer in state)


def _random_state(runner: Runner, batch: int, seed: int) -> State:
    generator = np.random.default_rng(seed)
    return tuple(
        {
            name: (0.1 * generator.standard_normal(tuple(value.shape))).astype(np.float32)
            for name, value in layer.items()
        }
        for layer in runner.init_state(batch)
    )


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
    logits, state = np.asarray(logits), _state_arrays(present)
    decided = decided_tokens(out.router_logits, model.config.topk)
    use = np.arange(length)[None] < decided[:, None]
    whole = decided >= length
    expected = _state_arrays(out.state)
    errors = [
        relative(state[layer][name][whole], expected[layer][name][whole])
        for layer in range(len(state))
        for name in state[layer]
    ]
    return relative(logits[use], out.logits.numpy()[use]), max(errors), use


def _against_model(runner: Runner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    results = [_compare(runner, model, *shape, seed=seed) for seed, shape in enumerate(PREFILL_SHAPES)]
    compared = np.concatenate([use.ravel() for *_, use in results])
    lengths = ", ".join(f"{batch}x{length}" for batch, length in PREFILL_SHAPES)
    return [
        compared_check("prefill logits", max(result[0] for result in results), tolerance, compared, lengths),
        compared_check(
            "prefill states", max(result[1] for result in results), tolerance, compared, "from random states"
        ),
        *(_decode(runner, model, tolerance, way, options) for way, options in runner.decode_ways().items()),
        _greedy(runner, model, tolerance),
    ]


def compared_check(name: str, error: float, tolerance: float, compared: NDArray[np.bool_], note: str = "") -> Check:
    share = float(compared.mean())
    if share < 1:
        note = f"{note}; {share:.0%} of the tokens: the rest follow a routing that hangs on rounding".lstrip("; ")
    return Check(name, error, error <= tolerance and share >= MIN_COMPARED, note)


def _decode(runner: Runner, model: MoMForCausalLM, tolerance: float, way: str, options: Mapping[str, Any]) -> Check:
    """Prefill, then 64 steps in one of the runner's ways to keep the state, against one pass of the model."""
    import torch

    prompt = 41  # the steps cross position 64
    ids = random_tokens(model.config.vocab_size, 2, prompt + DECODE_STEPS, seed=100)
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    use = np.arange(prompt, ids.shape[1])[None] < decided_tokens(out.router_logits, model.config.topk)[:, None]
    _, state = runner(ids[:, :prompt])
    step = runner.decode_loop(state, 2, **options)
    logits = np.stack([step(ids[:, t]).copy() for t in range(prompt, ids.shape[1])], 1)
    error = relative(logits[use], out.logits[:, prompt:].numpy()[use])
    return compared_check(f"{DECODE_STEPS} decode steps{way and ', '}{way}", error, tolerance, use)


def _greedy(runner: Runner, model: MoMForCausalLM, tolerance: float) -> Check:
    """Greedy tokens equal up to the first step whose two best logits are closer than the tolerance."""
    import torch

    prompt = random_tokens(model.config.vocab_size, 1, 20, seed=200)
    eos = None if runner.manifest["kind"] == "genai" else -1  # GenAI stops at its own
    actual = np.stack(list(runner.generate(prompt, DECODE_STEPS, eos_token_id=eos)), 1)[0]
    ids = model.generate(torch.from_numpy(prompt), DECODE_STEPS, eos_token_id=eos)
    expected = ids[0, prompt.shape[1] :].numpy()
    steps = len(expected)
    with torch.no_grad():
        out = model(ids[:, :-1])
    logits = out.logits[0, prompt.shape[1] - 1 :]
    best = logits.topk(min(2, logits.shape[-1]), -1).values
    close = (best[:, 0] - best[:, -1]) < tolerance * logits.norm(dim=-1) / logits.shape[-1] ** 0.5
    undecided = decided_tokens(out.router_logits, model.config.topk)[0] - (prompt.shape[1] - 1)
    first_close = int(close.int().argmax()) if bool(close.any()) else steps
    limit = max(0, min(first_close, int(undecided), steps))
    equal = len(actual) >= limit and bool((actual[:limit] == expected[:limit]).all())
    note = f"{limit} tokens" + ("" if limit == steps else f"; token {limit} hangs on rounding")
    return Check("greedy text", None, equal, note)


# ---- below float32 ---------------------------------------------------------------------------------------------------


def _same_routing(runner: Runner, model: MoMForCausalLM, tolerance: float) -> list[Check]:
    """The model with the artifact's own routing forced in, and how often the model would have chosen otherwise.

    Which memories the artifact chose shows in its states; on the same routing the layers' inputs stay comparable, so a
    disagreement counts once and drags nothing along.
    """
    import torch

    from ..memory_use import memory_use_of_runner

    length, topk = 150, model.config.topk
    ids = random_tokens(model.config.vocab_size, 1, length, seed=500)
    use = memory_use_of_runner(runner, ids[0].tolist())
    if not (use.sum(2) == topk).all():
        return [Check("logits with the same routing", None, False, "a token changed another number of memories")]
    indices = [torch.from_numpy(np.nonzero(layer)[1].reshape(1, length, topk)) for layer in use]
    with torch.no_grad():
        out = model(torch.from_numpy(ids), router_indices=indices)
    whole, state = runner(ids[:, :41])
    pieces = [np.asarray(whole)]
    step = runner.decode_loop(state, 1)
    pieces += [step(ids[:, t])[:, None].copy() for t in range(41, length)]
    error = relative(np.concatenate(pieces, 1), out.logits.numpy())
    different, margin = 0, 0.0
    for layer, logits in enumerate(out.router_logits):
        probability = torch.softmax(logits[0], -1).numpy()
        best = logits[0].sort(dim=-1, descending=True, stable=True).indices[:, :topk].numpy()
        for t, chosen in enumerate(use[layer]):
            missing = [m for m in best[t] if not chosen[m]]
            others = [m for m in np.flatnonzero(chosen) if m not in best[t]]
            different += len(missing)
            if missing:
                margin = max(margin, float(probability[t, missing].max() - probability[t, others].min()))
    agreement = 1 - different / use.sum()
    note = f"{agreement:.2%} of the choices, largest margin {margin:.1e}"
    rounding = tolerance <= LOW_PRECISION_TOLERANCE  # coarser weights may rightly choose otherwise
    agrees = not rounding or (agreement >= MIN_AGREEMENT and margin < LOW_PRECISION_MARGIN)
    return [
        Check("logits with the same routing", error, error <= tolerance, f"prefill of 41, {length - 41} decode steps"),
        Check("routing agreement", None, agrees, note),
    ]
