"""Launches of a kernel pack's functions on a GPU, recorded as files for ``native/check_pack.cpp``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mom_compile.export.kernel_functions import Function, Units
from mom_compile.export.kernel_table import entries
from mom_compile.ops._launch import Launch, instead_of_launches


def write_cases(folder: Path, cases: list[tuple[Function, Units]], architecture: int) -> int:
    """Run each function at its sizes, with the buffers of every launch before and after it in ``folder``.

    The outputs must be bit for bit those of a run without recording. Returns the number of launches.
    """
    folder.mkdir(parents=True)
    lines: list[str] = []
    launches = 0
    for number, (function, units) in enumerate(cases):
        table = [entry for entry in entries(function, architecture) if entry.smallest <= units[0] <= entry.largest]
        calls: list[tuple[Launch, list[Tensor], list[Tensor]]] = []

        def record(call: Launch, calls: Any = calls) -> None:
            before = [tensor.cpu() for tensor in call.args if isinstance(tensor, Tensor)]
            call.run()
            calls.append((call, before, [tensor.cpu() for tensor in call.args if isinstance(tensor, Tensor)]))

        with instead_of_launches(record):
            recorded = _run(function, units, number)
        plain = _run(function, units, number)
        for left, right in zip(recorded, plain, strict=True):
            assert torch.equal(_bytes(left), _bytes(right)), f"{function.name} {units}: two runs differ"
        assert len(calls) == len(table), f"{function.name} {units}: {len(calls)} launches, {len(table)} in the table"
        for position, (entry, (call, before, after)) in enumerate(zip(table, calls, strict=True)):
            assert entry.variant.kernel is call.kernel
            assert call.config.constants.items() <= entry.variant.constants.items()
            lines.append(f"{entry.name} {units[0]} {units[1]} {len(before)}")
            for index, pair in enumerate(zip(before, after, strict=True)):
                names = [f"{number}.{position}.{index}.{when}" for when in ("before", "after")]
                for name, tensor in zip(names, pair, strict=True):
                    (folder / name).write_bytes(_bytes(tensor).numpy().tobytes())
                lines.append(" ".join(names))
            launches += 1
    (folder / "launches.txt").write_text("\n".join(lines) + "\n")
    return launches


def _run(function: Function, units: Units, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        result = function.run(units, torch.device("cuda"))
    return [result] if isinstance(result, Tensor) else list(result)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().flatten().view(torch.uint8)
