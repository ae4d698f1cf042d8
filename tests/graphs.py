"""Graphs that are there already, in the place of those that an export would make."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

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
