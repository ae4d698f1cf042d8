"""A damaged, edited or foreign artifact is refused with a text that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import tiny_model

from mom_compile import MoMForCausalLM, _extras, export
from mom_compile.cli import main
from mom_compile.export import _onnxruntime, artifact


@pytest.fixture
def folder(small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_artifact[1], tmp_path / "copy"))


def _edit(folder: Path, seal: bool = True, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    if seal:
        manifest["manifest_sha256"] = artifact._body_hash(manifest)
    path.write_text(json.dumps(manifest))


def test_a_moved_folder_still_opens(folder: Path) -> None:
    moved = folder.rename(folder.parent / "elsewhere")
    assert export.verify(moved).passed


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold manifest.json"):
        export.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="must be that of a mom-compile artifact"):
        export.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        export.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.bin", "decode.onnx", "reference.npz"])
def test_a_truncated_file(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name} must have the hash in manifest.json, got another; it is damaged"):
        export.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} must lie in .*copy the whole folder"):
        export.load(folder)


def test_a_flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.bin must have the hash"):
        export.verify(folder)


def test_another_version(folder: Path) -> None:
    _edit(folder, state_layout_version=2)
    with pytest.raises(ValueError, match="state_layout_version must be 1, got 2; export the checkpoint again"):
        export.load(folder)
    _edit(folder, state_layout_version=1, format_version=9)
    with pytest.raises(ValueError, match="format_version must be 1, got 9"):
        export.load(folder)


def test_an_edited_manifest(folder: Path) -> None:
    _edit(folder, seal=False, tolerance=1.0)
    with pytest.raises(ValueError, match="must be as export wrote it, got one that was edited"):
        export.load(folder)


def test_state_shapes_that_do_not_fit_the_graph(folder: Path) -> None:
    _edit(
        folder, state=[{"name": "conv_state", "shape": [5, 48, 3]}, {"name": "recurrent_state", "shape": [5, 2, 8, 4]}]
    )
    with pytest.raises(ValueError, match=r"past_key_values\.0\.recurrent_state .*got \['batch', 10, 8, 8\]; the files"):
        export.load(folder)([[1, 2]])


def test_an_opset_the_runtime_does_not_know(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for path in folder.glob("*.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        model.opset_import[0].version = 99
        onnx.save(model, str(path))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    artifact.write_manifest(folder, manifest)
    message = r"prefill(_cpu)?\.onnx must open in onnxruntime .*upgrade onnxruntime, or export"
    with pytest.raises(ValueError, match=message):
        export.load(folder)([[1, 2]])


@pytest.mark.parametrize("length", [1, 63, 64])
def test_an_example_inside_one_chunk(length: int) -> None:
    from mom_compile.export.lowerings import lowerings
    from mom_compile.export.program import export_program

    with pytest.raises(ValueError, match=f"example_length must be more than one chunk of 64 tokens, got {length}; tra"):
        export_program(tiny_model(num_hidden_layers=1), False, lowerings("portable", False), example_length=length)


def test_another_model(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = small_artifact
    with pytest.raises(ValueError, match="model must have the configuration in"):
        export.verify(folder, tiny_model())
    other = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    other.lm_head.weight.data.mul_(1.01)
    report = export.verify(folder, other)
    assert not report.passed and "FAILED" in str(report)


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "logits against the recorded reference" in capsys.readouterr().out
    (folder / "weights.bin").unlink()
    assert main(["verify", str(folder)]) == 2
    assert "weights.bin must lie in" in capsys.readouterr().err
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    assert main(["verify", str(tmp_path / "checkpoint")]) == 0
    assert "one token at a time against packed" in capsys.readouterr().out


def test_missing_and_double_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r'pip install "mom-compile\[onnx\]"'):
        _extras.require("a_package_that_is_not_there", "onnx")
    monkeypatch.setattr(_onnxruntime.metadata, "version", lambda name: "1.30")
    with pytest.raises(ImportError, match=r"pip uninstall -y onnxruntime onnxruntime-gpu"):
        _onnxruntime.require_onnxruntime()


def test_an_old_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(ImportError, match=r"at least 1\.24, got 1\.20\.1; run: pip install --upgrade"):
        _onnxruntime.require_onnxruntime()
