"""Training: model, layer and operator, forward and backward, with MFU, memory and warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..captured_step import CapturedStep
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..mom_attention import MoMAttention
from ..precompile import precompiling
from .counts import forward_flops
from .measure import (
    device_name,
    free,
    matmul_ceiling,
    median_ms,
    peak_flops,
    seconds_since_start,
    versions,
    wait,
)
from .operators import COLUMNS as OPERATOR_COLUMNS
from .operators import RULE_LENGTH, RULE_SHAPES, compare_rule
from .peers import load_peers, recorded
from .report import Table, plot_lines
from .sizes import size

COLUMNS = {
    "size": 0, "level": 6, "what": 22, "batch": 5, "length": 7, "ms": 9, "tokens_per_s": 12, "us_per_token": 12,
    "times_ours": 10, "tflop_s": 8, "of_matmul": 9, "mfu": 6, "peak_gib": 8, "first_step_s": 12, "since_start_s": 13,
    "note": 30,
}  # fmt: skip
OURS = "mom-compile"
LONG = 2**16
"""Tokens of a step from which a third of the repetitions is enough."""


class Options(NamedTuple):
    """What ``bench train`` times.

    Attributes:
        size: name of a model in ``SIZES``.
        shapes: (batch, length) of the steps; the first one's first call is the warm-up that is reported.
        compile: run every block through ``torch.compile`` (regional compilation).
        memory: memory policy, see :mod:`mom_compile.memory_policy`; a step that does not fit is tried with
            ``block`` for a third of the blocks, then for all.
        graph: on a GPU, replay our steps as one CUDA graph each, as ``train`` does.
        repeats: measurements a median is over; a third of it from ``LONG`` tokens up.
        peers: folder of adapters or None.
        operators: also the gated delta rule beside the peers'.
        slow_peers: also time the peers' layer, which may tune itself for minutes.
        out: folder for train.csv and train-operators.csv or None.
    """

    size: str = "512m"
    shapes: Sequence[tuple[int, int]] = ((8, 2048), (1, 16384))
    compile: bool = True
    memory: str = "auto"
    graph: bool = True
    repeats: int = 6
    peers: Path | None = None
    operators: bool = True
    slow_peers: bool = False
    out: Path | None = None


class Ceilings(NamedTuple):
    """FLOP/s of this machine: measured in this run, and the data sheet's (None: unknown)."""

    matmul: float
    peak: float | None


def bench_train(options: Options, device: torch.device) -> Table:
    """Time forward + backward of the model and of one layer, and the rule's operator beside the peers'.

    bfloat16 parameters on a GPU, float32 on a CPU. MFU is the model's FLOP (``counts.forward_flops`` times three, no
    recomputation counted) over the data sheet's; ``of_matmul`` over the product measured in this run.

    Returns:
        The table of steps.
    """
    config = size(options.size)
    options = options._replace(graph=options.graph and device.type == "cuda")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common = {"device": device_name(device), "versions": versions()}
    table = Table(COLUMNS, common, options.out and options.out / "train.csv")
    first = _model(table, options, config, device, dtype)
    _layer(table, options, config, device, dtype)
    for row in recorded(options.peers, device, what="forward + backward", size=options.size):
        key = int(row["batch"]), int(row["length"])
        ms = float(row["ms"])
        tokens = key[0] * key[1]
        table.add(
            size=options.size, level="model", what=row["model"], batch=key[0], length=key[1], ms=ms,
            tokens_per_s=tokens / ms * 1e3, us_per_token=ms * 1e3 / tokens, peak_gib=float(row["peak_gib"]),
            times_ours=ms / first[key] if key in first else None,
            note=f"recorded {row['date']}, {row['versions']}; {row['note']}",
        )  # fmt: skip
    if not options.operators:
        return table
    rules = Table(OPERATOR_COLUMNS, common, options.out and options.out / "train-operators.csv")
    # One shape: a peer tunes itself at each; `bench operators --peer` has them all.
    length, shapes = (RULE_LENGTH, RULE_SHAPES[:1]) if device.type == "cuda" else (128, ((2, 32),))
    compare_rule(rules, options.peers, device, dtype, length, shapes, 20)
    return table


def _model(
    table: Table, options: Options, config: MoMConfig, device: torch.device, dtype: torch.dtype
) -> dict[tuple[int, int], float]:
    """Rows of the whole model; the ms by (batch, length)."""
    torch.manual_seed(0)
    with device:
        model = MoMForCausalLM(config).to(dtype).train()
    leaves = list(model.parameters())

    @cache
    def compile_blocks() -> None:
        if options.compile:
            for block in model.model.layers:
                block.compile(fullgraph=True)

    # After the first step, so that the time since the process's start is that step's.
    ceilings: Ceilings | None = None
    times = {}
    for batch, length in options.shapes:
        row = {"size": options.size, "level": "model", "what": OURS, "batch": batch, "length": length}
        ids = torch.randint(0, config.vocab_size, (batch, length), device=device)

        def step(ids: Tensor = ids) -> None:
            loss = model(ids, labels=ids).loss
            assert loss is not None
            loss.backward()

        def first_step(batch: int = batch, length: int = length, step: Callable[[], None] = step) -> None:
            with precompiling(model, batch, length):
                compile_blocks()  # torch imports its compiler here
                step()

        measured = None
        for policy in dict.fromkeys((options.memory, f"block:{max(config.num_hidden_layers // 3, 1)}", "block")):
            model.set_memory_policy(policy)
            free(device)  # what a step that did not fit had allocated is held until its error is gone
            try:
                warm_up, since_start = _first(first_step, device)
                if ceilings is None:
                    ceilings = Ceilings(matmul_ceiling(device, dtype), peak_flops(device))
                    print(f"matrix product {ceilings.matmul / 1e12:.3g} TFLOP/s", flush=True)
                else:
                    since_start = None
                repeats = options.repeats if batch * length < LONG else max(options.repeats // 3, 2)
                measured = _measure(step, leaves, device, repeats, options.graph)
                break
            except torch.OutOfMemoryError:
                model.zero_grad()
        if measured is None or ceilings is None:
            table.add(**row, note="out of memory")
            continue
        ms, peak = measured
        tokens = batch * length
        times[batch, length] = ms
        flops = 3 * forward_flops(config, tokens) / ms * 1e3
        table.add(
            **row, ms=ms, tokens_per_s=tokens / ms * 1e3, us_per_token=ms * 1e3 / tokens, times_ours=1.0,
            tflop_s=flops / 1e12, of_matmul=flops / ceilings.matmul,
            mfu=flops / ceilings.peak if ceilings.peak else None, peak_gib=peak, first_step_s=warm_up,
            since_start_s=since_start,
            note=f"{_how('blocks compiled', options)}, memory {policy}",
        )  # fmt: skip
    return times


def _layer(table: Table, options: Options, config: MoMConfig, device: torch.device, dtype: torch.dtype) -> None:
    batch, length = options.shapes[0]
    row = {"size": options.size, "level": "layer", "batch": batch, "length": length}
    layers: list[tuple[str, str, Callable[[Tensor], Tensor], bool]] = []
    ours = MoMAttention(config).to(device, dtype).train()
    if options.compile:
        ours.compile(fullgraph=True)
    layers.append((OURS, _how("compiled", options), lambda x: ours(x)[0], options.graph))
    for peer in load_peers(options.peers, "layer"):
        if getattr(peer, "SLOW", False) and not options.slow_peers:
            print(f"{peer.NAME}'s layer tunes itself for minutes: --slow-peers times it")
            continue
        note = peer.unguarded() if hasattr(peer, "unguarded") else ""
        layers.append((peer.NAME, note, peer.layer(config, device, dtype), False))
    base: float | None = None
    for what, note, layer, graph in layers:
        x = torch.randn(batch, length, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)

        def step(layer: Callable[[Tensor], Tensor] = layer, x: Tensor = x, grad: Tensor = grad) -> None:
            layer(x).backward(grad)

        warm_up, _ = _first(step, device)
        leaves = [x, *(ours.parameters() if what == OURS else ())]
        ms, peak = _measure(step, leaves, device, options.repeats, graph)
        base = ms if base is None else base
        tokens = batch * length
        table.add(
            **row, what=what, ms=ms, tokens_per_s=tokens / ms * 1e3, us_per_token=ms * 1e3 / tokens,
            times_ours=ms / base, peak_gib=peak, first_step_s=warm_up, note=note or None,
        )  # fmt: skip


def _how(compiled: str, options: Options) -> str:
    return (compiled if options.compile else "eager") + ", CUDA graph" * options.graph


def _first(step: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds of the first call, and seconds since the process started at its end."""
    wait(device)
    seconds = median_ms(step, torch.device("cpu"), repeats=1, warm_up=0) / 1e3
    wait(device)
    return seconds, seconds_since_start()


def _measure(
    step: Callable[[], None], leaves: Sequence[Tensor], device: torch.device, repeats: int, graph: bool
) -> tuple[float, float | None]:
    """Median ms, and peak memory in GiB on a GPU. ``leaves``: whose gradients a step makes, each time anew."""

    def fresh() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        step()
        return ()

    if device.type != "cuda":
        return median_ms(fresh, device, repeats, warm_up=1), None
    torch.cuda.reset_peak_memory_stats(device)
    run = CapturedStep(fresh, leaves) if graph else fresh
    ms = median_ms(run, device, repeats, warm_up=1)
    for leaf in leaves:
        leaf.grad = None  # else it holds the graph's memory
    return ms, torch.cuda.max_memory_allocated(device) / 2**30


def plot_train(table: Table, path: Path) -> bool:
    """Microseconds per token against the length of one sequence; whether it was drawn."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        if row["level"] == "model" and row["batch"] == 1 and "us_per_token" in row:
            lines.setdefault(row["what"], []).append((row["length"], row["us_per_token"]))
    ordered = {label: sorted(points) for label, points in lines.items()}
    return plot_lines(path, ordered, "Forward + backward of one sequence", "tokens", "µs per token")
