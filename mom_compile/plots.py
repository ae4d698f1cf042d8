"""Pictures: a run from its metrics.jsonl, and which memories a text's tokens used."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._extras import require

if TYPE_CHECKING:
    from .memory_use import MemoryUse

LOSS_PLOT = "loss.png"
MEMORIES_PLOT = "memories.png"
LABELLED_TOKENS = 120


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a crash cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_run(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Draw loss.png and memories.png from the metrics of a run folder.

    Returns:
        The files written: none for a run without metrics.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(run_folder)
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    steps = [record for record in records if "loss" in record]
    if not steps:
        return []
    pyplot = import_pyplot()
    return [
        _plot_loss(pyplot, folder / LOSS_PLOT, steps, [r for r in records if "held_out_bits_per_byte" in r]),
        _plot_memories(pyplot, folder / MEMORIES_PLOT, steps),
    ]


def _plot_loss(pyplot: Any, path: Path, steps: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([r["step"] for r in steps], [r["bits_per_byte"] for r in steps], label="training", linewidth=1)
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["held_out_bits_per_byte"] for r in held_out],
            label="held out",
            marker="o",
        )
    axes.set(xlabel="step", ylabel="bits per byte", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_memories(pyplot: Any, path: Path, steps: list[dict[str, Any]]) -> Path:
    layers = len(steps[-1]["memory_shares"])
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.5 * columns, 2.8 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        lines = list(zip(*(r["memory_shares"][layer] for r in steps), strict=True))
        axes.stackplot([r["step"] for r in steps], *lines)
        axes.set(title=f"layer {layer}", xlabel="step", ylim=(0, 1))
        axes.margins(x=0)
    grid[0, 0].set_ylabel("share of choices")
    figure.suptitle("What each routed memory takes")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_memory_use(path: str | os.PathLike[str], use: MemoryUse, tokens: Sequence[str]) -> Path:
    """Draw one strip per layer: tokens from left to right, a dark cell where a memory was selected.

    Args:
        path: the PNG to write.
        use: ``[layers, T, M]``.
        tokens: their texts, ``T`` of them; written on the axis while they are few enough to read.

    Raises:
        ImportError: matplotlib is missing.
    """
    pyplot = import_pyplot()
    layers, length, memories = use.shape
    size = (min(20, 2 + 0.16 * length), 0.6 + layers * (0.5 + 0.16 * memories))
    figure, grid = pyplot.subplots(layers, 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for layer, axes in enumerate(grid.flat):
        axes.imshow(use[layer].T, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=f"layer {layer}", ylabel="memory", yticks=range(memories))
    if length <= LABELLED_TOKENS:
        # A dollar sign would start a formula.
        labels = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        grid[-1, 0].set_xticks(range(length), labels, rotation=90, fontsize=7)
    grid[-1, 0].set_xlabel("token")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)


def import_pyplot() -> Any:
    """matplotlib.pyplot that draws to files.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib", "train").use("Agg")
    return require("matplotlib.pyplot", "train")
