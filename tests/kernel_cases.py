"""Launches of a kernel pack's functions on a GPU, recorded as files for ``cpp/check_pack.cpp``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mom_compile.export.kernel_function import Function
from mom_compile.export.kernel_table import entries
from mom_compile.export.launch_formula import Units
from mom_compile.ops._launch import Launch, instead_of_launches


def write_cases(
    folder: Path, cases: list[tuple[Function, Units]], architecture: int, device: torch.device | str = "cuda"
) -> int:
    """Run each function at its sizes, with the buffers of every launch before and after it in ``folder``.

    The outputs must be bit for bit those of a run without recording. Returns the number of cases: the launches
    one by one, and each function as a whole.
    """
    folder.mkdir(parents=True)
    lines: list[str] = []
    plugin: list[str] = []
    for number, (function, units) in enumerate(cases):
        table = [entry for entry in entries(function, architecture) if entry.smallest <= units[0] <= entry.largest]
        calls: list[tuple[Launch, list[Tensor], list[Tensor]]] = []

        def record(call: Launch, calls: Any = calls) -> None:
            before = [tensor.cpu() for tensor in call.args if isinstance(tensor, Tensor)]
            call.run()
            calls.append((call, before, [tensor.cpu() for tensor in call.args if isinstance(tensor, Tensor)]))

        with instead_of_launches(record):
            recorded = _run(function, units, number, device)
        plain = _run(function, units, number, device)
        for left, right in zip(recorded, plain, strict=True):
            assert torch.equal(_bytes(left), _bytes(right)), f"{function.name} {units}: two runs differ"
        assert len(calls) == len(table), f"{function.name} {units}: {len(calls)} launches, {len(table)} in the table"
        first: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        for entry, (call, before, after) in zip(table, calls, strict=True):
            assert entry.variant.kernel is call.kernel
            assert call.config.constants.items() <= entry.variant.constants.items()
            assert tuple(axis(units) for axis in entry.grid) == (*call.grid, 1, 1)[:3], f"{entry.name} {units}"
            pointers = [argument for argument in entry.arguments if argument.shape is not None]
            names = [argument.name for argument in pointers]
            for argument, tensor in zip(pointers, before, strict=True):
                assert [axis(units) for axis in argument.shape or ()] == list(tensor.shape), f"{entry.name} {units}"
            buffers = list(zip(names, before, after, strict=True))
            lines += _write(folder, f"launch {entry.name}", units, buffers)
            for name, tensor in zip(names, before, strict=True):
                first.setdefault(name, tensor)
            last |= dict(zip(names, after, strict=True))
        lines += _write(folder, f"run {function.name}", units, [(name, first[name], last[name]) for name in first])
        if function.operator == "mom::decode_step_":
            plugin += _write_plugin(folder, f"{function.name} {units[0]}", first, last)
    (folder / "plugin.txt").write_text("\n".join(plugin) + "\n")
    (folder / "launches.txt").write_text("\n".join(lines) + "\n")
    return sum(line.startswith(("launch ", "run ")) for line in lines)


def _write_plugin(folder: Path, title: str, first: dict[str, Tensor], last: dict[str, Tensor]) -> list[str]:
    """A call of the decode step's plugin, for ``cpp/check_plugin.cpp``."""
    inputs = [name for name in first if name not in ("y", "o")]
    outputs = ["o", *(name for name in inputs if name in ("state", "conv_state"))]
    lines = [f"{title} {len(inputs)} {len(outputs)}"]
    for names, values in ((inputs, first), (outputs, last)):
        for name in names:
            file, tensor = str(len(list(folder.iterdir()))), values[name]
            (folder / file).write_bytes(_bytes(tensor).numpy().tobytes())
            sizes = " ".join(map(str, tensor.shape))
            lines.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tensor.dim()} {sizes} {file}")
    return lines


def _write(folder: Path, title: str, units: Units, buffers: list[tuple[str, Tensor, Tensor]]) -> list[str]:
    lines = [f"{title} {' '.join(map(str, units))} {len(buffers)}"]
    for name, before, after in buffers:
        files = []
        for tensor in (before, after):
            files.append(str(len(list(folder.iterdir()))))
            (folder / files[-1]).write_bytes(_bytes(tensor).numpy().tobytes())
        lines.append(f"{name} {' '.join(files)}")
    return lines


def _run(function: Function, units: Units, seed: int, device: torch.device | str) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        result = function.run(units, torch.device(device))
    return [result] if isinstance(result, Tensor) else list(result)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().flatten().view(torch.uint8)
