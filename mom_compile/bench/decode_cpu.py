"""Decoding and prefill on a CPU: each form beside the time that reading the weights and the states once takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import export
from ..config import MoMConfig
from ..decode import DecodeSession
from ..model import MoMForCausalLM
from .counts import tensor_bytes, weight_bytes
from .measure import device_name, interleaved_ms, reads, versions
from .report import Table
from .sizes import size

COLUMNS = {"size": 0, "what": 26, "form": 26, "batch": 5, "ms": 9, "of_limit": 9, "times_first": 11, "note": 40}
FORMS = ("eager", "compiled", "onnxruntime")
CPU = torch.device("cpu")


@torch.no_grad()
def bench_decode_cpu(
    name: str,
    batches: Sequence[int],
    prompt: int,
    forms: Sequence[str],
    touched: bool,
    repeats: int = 30,
    path: Path | None = None,
    folder: Path | None = None,
    one_thread: bool = False,
) -> Table:
    """Time float32 forms of one model against each other; only ratios of one run mean something on a shared CPU.

    Args:
        name: of a model in ``SIZES``.
        batches: sequences at once.
        prompt: tokens of the prefill.
        forms: of ``FORMS``; ``times_first`` is each one's time over that of the first.
        touched: also compare whole-state and touched-state decoding of one layer with 8 memories.
        repeats: measurements a median is over.
        path: CSV to write or None.
        folder: of the model's artifact, kept there; None: a new one.
        one_thread: for a machine that others use: one thread, whose own time is taken, as if it were never stopped.

    Returns:
        The table; ``of_limit`` is the time to read weights and states once over the time taken.

    Raises:
        ImportError: a form needs a package that is missing.
    """
    if one_thread:
        torch.set_num_threads(1)
    clock = time.process_time if one_thread else time.perf_counter
    threads = 1 if one_thread else None
    device = f"{device_name(CPU)}{', time of the process' if one_thread else ''}"
    table = Table(COLUMNS, {"device": device, "versions": _versions(forms)}, path)
    config = size(name)
    torch.manual_seed(0)
    model = MoMForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as temporary:
        artifact = folder or Path(temporary) / "artifact"
        if "onnxruntime" in forms and not artifact.exists():
            export.to_onnx(model, artifact)
        for batch in batches:
            moved = weight_bytes(model) + sum(tensor_bytes(layer.values()) for layer in model.init_state(batch))
            size_read, readers = reads(CPU)
            names, steps = zip(*_decoders(model, artifact, batch, forms, threads), strict=True)
            *taken, one, other = interleaved_ms([*steps, *readers], CPU, repeats, clock=clock)
            bandwidth = size_read / min(one, other) * 1e3
            for form, ms in zip(names, taken, strict=True):
                table.add(
                    size=name, what="decode", form=form, batch=batch, ms=ms, times_first=ms / taken[0],
                    of_limit=moved / bandwidth * 1e3 / ms,
                    note=f"{moved / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s, both of this run",
                )  # fmt: skip
            names, steps = zip(*_prefills(model, artifact, batch, prompt, forms, threads), strict=True)
            taken = interleaved_ms(steps, CPU, max(repeats // 6, 3), rounds=3, clock=clock)
            for form, ms in zip(names, taken, strict=True):
                what = f"prefill of {prompt}"
                table.add(size=name, what=what, form=form, batch=batch, ms=ms, times_first=ms / taken[0])
    if touched:
        for hidden in (64, 256):
            for batch in (1, 4):
                touched_rows(table, hidden, batch, repeats=max(repeats, 20), threads=threads)
    return table


def _versions(forms: Sequence[str]) -> str:
    if "onnxruntime" not in forms:
        return versions()
    from .._extras import require

    return f"{versions()}, onnxruntime {require('onnxruntime', 'onnx').__version__}"


def _decoders(
    model: MoMForCausalLM, artifact: Path, batch: int, forms: Sequence[str], threads: int | None
) -> Iterator[tuple[str, Callable[[], object]]]:
    ids = torch.randint(0, model.config.vocab_size, (batch,))
    for form in ("eager", "compiled"):
        if form in forms:
            session = DecodeSession(model, batch, compile=form == "compiled")
            yield form, lambda session=session: session.step(ids)  # type: ignore[misc]
    if "onnxruntime" in forms:
        ways: dict[str, tuple[bool, dict[str, Any]]] = {
            "onnxruntime": (False, {"fused": True, "aliased": True}),
            "onnxruntime, its own nodes": (False, {"touched": True}),
            "onnxruntime, prepacked": (True, {"touched": True}),
            "onnxruntime, whole state": (False, {"touched": False}),
        }
        for form, (prepack, options) in ways.items():
            runner = export.load(artifact, prepack=prepack, threads=threads)
            if "fused" in options and runner.not_run():
                continue  # its library could not be built
            step = runner.decode_loop(runner.init_state(batch), batch, **options)
            yield form, lambda step=step: step(ids.numpy())  # type: ignore[misc]


def _prefills(
    model: MoMForCausalLM, artifact: Path, batch: int, length: int, forms: Sequence[str], threads: int | None
) -> Iterator[tuple[str, Callable[[], object]]]:
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    state = model.init_state(batch)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for form, function in {"eager": model, "compiled": compiled}.items():
        if form in forms:
            yield form, lambda function=function: function(ids, state=state)  # type: ignore[misc]
    if "onnxruntime" in forms:
        settings: dict[str, dict[str, Any]] = {
            "onnxruntime": {},
            "onnxruntime, its own nodes": {"fused": False},
            "onnxruntime, prepacked": {"fused": False, "prepack": True},
        }
        for form, options in settings.items():
            runner = export.load(artifact, threads=threads, **options)
            empty = runner.init_state(batch)
            yield form, lambda runner=runner, empty=empty: runner(ids.numpy(), empty)  # type: ignore[misc]


def touched_rows(
    table: Table,
    hidden: int,
    batch: int,
    heads: int = 16,
    dim: int = 128,
    memories: int = 8,
    repeats: int = 20,
    threads: int | None = None,
) -> None:
    """One layer in onnxruntime: the whole state, one shared buffer, the touched memories alone, those in place.

    With a small ``hidden`` the states outweigh the projections, which all three read whole.
    """
    config = MoMConfig(
        vocab_size=257, hidden_size=hidden, num_hidden_layers=1, num_heads=heads, head_dim=dim, num_memories=memories,
        topk=2, intermediate_size=hidden,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoMForCausalLM(config).eval()
    states = sum(tensor_bytes(layer.values()) for layer in model.init_state(batch))
    note = f"weights {tensor_bytes(model.parameters()) / 1e6:.1f} MB, states {states / 1e6:.1f} MB"
    with tempfile.TemporaryDirectory() as folder:
        export.to_onnx(model, Path(folder) / "x")
        runner = export.load(Path(folder) / "x", threads=threads)
        ids = np.random.default_rng(0).integers(0, 257, (batch, 8))
        _, state = runner(ids)
        ways = {"whole": {"touched": False}, "one buffer": {"aliased": True}, "touched": {"touched": True}}
        if not runner.not_run():
            ways["touched, fused layer"] = {"fused": True, "aliased": True}

        def caller(options: dict[str, bool]) -> Callable[[], object]:
            step, tokens = runner.decode_loop(state, batch, **options), iter(range(10**9))
            return lambda: step(ids[:, next(tokens) % 8])

        clock = time.perf_counter if threads is None else time.process_time
        taken = interleaved_ms([caller(options) for options in ways.values()], CPU, 5 * repeats, clock=clock)
        for form, ms in zip(ways, taken, strict=True):
            what = f"layer, M = {memories}, D = {hidden}"
            table.add(what=what, form=form, batch=batch, ms=ms, times_first=ms / taken[0], note=note)
