"""What others' implementations are timed with: adapters in a folder, and figures that were recorded once.

An adapter is a Python file with a ``NAME``, a ``missing()`` that says why it cannot be timed here ('' where it can),
and any of

- ``decoder(config, device, dtype)``: a model of that size, as ``(batch, context) -> (step, bytes that a step moves)``;
  MemoryError where the context does not fit;
- ``chunk_gated_delta_rule(q, k, v, g, beta)``: o, differentiable;
- ``layer(config, device, dtype)``: a module that takes ``[B, T, D]`` and returns the same shape;
- ``NOTE``: printed beside its decoder's figures; ``SLOW``: its decoder and layer tune themselves for minutes;
- ``unguarded()``: called before a backward is timed, returns what to say about it.

Recorded figures are the files ``peer-*.csv`` of the folder ``results`` beside it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .measure import device_name
from .report import read_rows


def peers_folder(path: str | None) -> Path | None:
    """The folder of adapters: the given one, else that of the source tree this package runs from, else None.

    Raises:
        ValueError: a given folder that does not exist.
    """
    folder = Path(path) if path else Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
    if folder.is_dir():
        return folder
    if path:
        raise ValueError(f"peers must be a folder of adapters, got {path!r}; pass benchmarks/peers of the source tree")
    return None


def load_peers(folder: Path | None, function: str) -> Iterator[ModuleType]:
    """The adapters that have ``function`` and can run here; why one cannot is printed."""
    for path in sorted(folder.glob("*.py")) if folder else []:
        spec = importlib.util.spec_from_file_location(f"mom_compile_peer_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            continue
        reason = module.missing()
        if reason:
            print(f"{module.NAME} is not timed: {reason}", flush=True)
        else:
            yield module


def recorded(folder: Path | None, device: torch.device, **wanted: Any) -> Iterator[dict[str, str]]:
    """Recorded rows of others' implementations on this kind of device, with these values."""
    for path in sorted((folder.parent / "results").glob("peer-*.csv")) if folder else []:
        for row in read_rows(path):
            if row["device"] == device_name(device) and all(row[name] == str(v) for name, v in wanted.items()):
                yield row
