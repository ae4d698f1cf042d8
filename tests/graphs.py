"""Graphs that are there already, in the place of those that an export would make."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mom_compile.export import onnx_artifact
from mom_compile.export.artifact import read_manifest


def reuse_graphs(monkeypatch: pytest.MonkeyPatch, source: Path, wrong: str | None = None) -> None:
    """Let ``to_onnx`` take the graphs of an artifact of the same model: for tests of what it does with them.

    ``wrong`` is a file among them, whose logits change their sign.
    """

    def copy(model: Any, folder: Path, *_: Any) -> dict[str, Any]:
        for path in (*source.glob("*.onnx"), source / onnx_artifact.WEIGHTS_FILE):
            shutil.copy(path, folder)
        if wrong is not None:
            _negate_logits(folder / wrong)
        io: dict[str, Any] = read_manifest(source)["io"]
        return io

    monkeypatch.setattr(onnx_artifact, "_write_graphs", copy)


def _negate_logits(file: Path) -> None:
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    for node in proto.graph.node:
        node.output[:] = ["negative" if name == "logits" else name for name in node.output]
    proto.graph.node.append(onnx.helper.make_node("Neg", ["negative"], ["logits"]))
    onnx.save(proto, str(file))


class _Program:
    """What ``trace`` will give: traced when something other than a kept graph is asked of it."""

    def __init__(self, key: str, make: Callable[[], torch.export.ExportedProgram]) -> None:
        self.key, self.genuine = key, functools.cache(make)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.genuine(), name)


def trace_once(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the ONNX targets trace and convert a program once for all tests and processes of a run.

    Programs are the same if their class, lowerings, weights, inputs and dynamic axes are, and the converter's options.
    A precision, joined products and all that is checked of an artifact come after.
    """
    import onnx
    import onnx_ir as ir

    from mom_compile.export import genai_artifact, genai_engine, program

    genuine_trace, genuine_export = program.trace, torch.onnx.export

    exporters = program, genai_artifact, genai_engine

    def trace(module: Any, inputs: Any, shapes: Any) -> Any:
        if type(module).__module__ not in [exporter.__name__ for exporter in exporters]:
            return genuine_trace(module, inputs, shapes)  # of a target that keeps the program
        key = _description((module, inputs, shapes))
        make = functools.partial(genuine_trace, module, inputs, shapes)
        # What has no name but its address may be another next time.
        return make() if " at 0x" in key else _Program(hashlib.sha256(key.encode()).hexdigest(), make)

    def export(model: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(model, _Program):
            return genuine_export(model, *args, **options)
        key = hashlib.sha256(_description((model.key, args, options)).encode()).hexdigest()
        file = folder / f"{key}.onnx"
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists():
                return SimpleNamespace(model=ir.from_proto(onnx.load(file)))
            result: Any = genuine_export(model.genuine(), *args, **options)
            onnx.save(ir.to_proto(result.model), file)
        return result

    folder.mkdir(exist_ok=True)
    for module in exporters:
        patch.setattr(module, "trace", trace)
    patch.setattr(torch.onnx, "export", export)


def _description(value: Any) -> str:
    """Whatever a graph may depend on, in words."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_content(value)).hexdigest()}"
    if isinstance(value, torch.nn.Module):
        settings = {name: x for name, x in vars(value).items() if not name.startswith("_")}
        parts = {**value._parameters, **value._buffers, **value._modules}
        return f"{type(value).__qualname__} {_description(settings)} {_description(parts)}"
    if isinstance(value, functools.partial):
        return f"partial {_description((value.func, value.args, value.keywords))}"
    if callable(value) and hasattr(value, "__qualname__"):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return f"{getattr(value, '__module__', '')}.{value.__qualname__} {_description(cells)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_description(k)}: {_description(x)}' for k, x in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_description, value))}]"
    return f"{type(value).__name__} {value!r}"


def _content(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
