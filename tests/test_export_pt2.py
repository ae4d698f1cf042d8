"""pt2 artifacts: exact round trip, operators whole, one copy of the weights, schemas checked."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import VARIANTS, tiny_model, tokens
from sessions import check_interleaved

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.config import UPDATE_RULES
from mom_compile.export import artifact
from mom_compile.export.pt2_artifact import export_whole


def test_the_report_and_the_manifest(pt2_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = pt2_artifact
    report = export.verify(folder, model)
    assert report.passed, str(report)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "pt2" and manifest["parity"]["error"] < 1e-5
    assert set(manifest["files"]) == {"prefill.pt2", "decode.pt2", "weights.safetensors", "reference.npz"}
    assert manifest["io"]["prefill"]["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
        {"name": "state.0.conv_state", "dtype": "float32", "shape": ["batch", 5, 48, 3]},
        {"name": "state.0.recurrent_state", "dtype": "float32", "shape": ["batch", 5, 2, 8, 8]},
    ]
    assert manifest["io"]["prefill"]["operators"]["mom::chunk_gated_delta_rule"] == 1
    assert manifest["io"]["decode"]["operators"]["mom::decode_step"] == 1
    assert set(manifest["operator_schemas"]) >= {"mom::route", "mom::chunk_gated_delta_rule", "mom::gated_rms_norm"}


def test_the_round_trip_is_exact() -> None:
    """Every rule; lengths off the example's; what was saved gives what was exported, which is what the model gives."""
    import io

    model = tiny_model(list(UPDATE_RULES), num_hidden_layers=5, num_v_heads=4)
    weights = dict(sorted(model.named_parameters()))
    for form, shapes in (("packed", [(1, 65), (3, 130)]), ("step", [(3, 1)])):
        program = export_whole(model, form)  # type: ignore[arg-type]
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for batch, length in shapes:
            ids = tokens(batch, length)
            with torch.no_grad():
                state = model(tokens(batch, 10)).state
                expected = model(ids, state=state, form=form)
                for module in (program.module(), loaded):
                    logits, present = module(weights, ids, state)
                    assert torch.equal(logits, expected.logits)
                    assert type(present) is tuple and all(type(layer) is dict for layer in present)
                    for layer, values in enumerate(present):
                        for name, value in values.items():
                            assert torch.equal(value, expected.state[layer][name])


def test_the_weights_are_stored_once_and_no_file_names_the_machine(pt2_artifact: tuple[MoMForCausalLM, Path]) -> None:
    import zipfile

    model, folder = pt2_artifact
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 1.02 * parameters + 4096
    for name in ("prefill.pt2", "decode.pt2"):
        with zipfile.ZipFile(folder / name) as archive:
            content = b"".join(archive.read(entry) for entry in archive.namelist())
            assert not any(
                archive.getinfo(entry).file_size for entry in archive.namelist() if "/weights/weight" in entry
            )
        assert str(Path(__file__).parent.parent).encode() not in content and b"site-packages" not in content


def test_the_runner(pt2_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = pt2_artifact
    runner = export.load(folder)
    ids = torch.randint(0, 256, (2, 70))
    state = runner.init_state(2)
    logits, present = runner(ids, state)
    assert isinstance(logits, torch.Tensor) and isinstance(present[0]["recurrent_state"], torch.Tensor)
    assert not any(value.any() for layer in state for value in layer.values())
    with torch.no_grad():
        expected = model(ids, state=model.init_state(2))
    assert torch.equal(logits, expected.logits)
    arrays = tuple({name: value.numpy() for name, value in layer.items()} for layer in present)
    again, _ = runner(ids[:, :3].numpy(), arrays)
    assert torch.equal(again, runner(ids[:, :3], present)[0])
    steps = np.stack(list(runner.generate(ids, 30, eos_token_id=-1)), 1)
    assert np.array_equal(steps, model.generate(ids, 30, eos_token_id=-1)[:, 70:].numpy())
    with pytest.raises(
        ValueError, match=r"state\[0\]\['conv_state'\] must be one of float32, float16, bfloat16, got float64"
    ):
        runner(ids, tuple({name: value.double() for name, value in layer.items()} for layer in state))
    with pytest.raises(ValueError, match=r"must have shape \(1, 5, 48, 3\), got \(2, 5, 48, 3\)"):
        runner(ids[:1], state)


def test_an_artifact_kept_from_an_earlier_commit() -> None:
    """Its programs were made by an earlier version of the operators, and must go on giving what they gave then."""
    folder = Path(__file__).parent / "data" / "pt2-kept"
    report = export.verify(folder)
    assert report.passed and report.error < 1e-5, str(report)
    runner = export.load(folder)
    ids = np.random.default_rng(0).integers(0, 20, (2, 70))
    whole, state = runner(ids)
    again, other = runner(ids[:, :69])
    last, other = runner(ids[:, 69:], other)
    assert torch.allclose(torch.cat([again, last], 1), whole, atol=1e-5)
    for one, two in zip(state, other, strict=True):
        for name, value in one.items():
            assert torch.allclose(value, two[name], atol=1e-5)


@pytest.mark.parametrize("name", ["single-kv-no-conv", "one-memory"])
def test_variants(name: str, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1, **VARIANTS[name])
    assert export.to_pt2(model, tmp_path / "x").passed


def test_interleaved_conversations(pt2_artifact: tuple[MoMForCausalLM, Path]) -> None:
    check_interleaved(pt2_artifact[1])


def test_a_state_goes_on_in_onnxruntime(
    pt2_artifact: tuple[MoMForCausalLM, Path], small_artifact: tuple[MoMForCausalLM, Path]
) -> None:
    """Layout version 1 is one layout: only the names, shapes and dtypes matter to a runner."""
    state = export.load(pt2_artifact[1])([[65, 66]])[1]
    one, _ = export.load(small_artifact[1])([[67, 68]], state)
    with torch.no_grad():
        two = small_artifact[0](torch.tensor([[67, 68]]), state=state).logits
    assert np.allclose(one, two.numpy(), atol=1e-4)


def _damaged(folder: Path, target: Path, name: str, schema: str) -> Path:
    shutil.copytree(folder, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["operator_schemas"][name] = schema
    del manifest["manifest_sha256"]
    artifact.write_manifest(target, manifest)
    return target


def test_schemas_are_checked_at_load(pt2_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    _, folder = pt2_artifact
    current = json.loads((folder / "manifest.json").read_text())["operator_schemas"]["mom::gated_rms_norm"]
    assert "float eps" in current
    changed = _damaged(folder, tmp_path / "a", "mom::gated_rms_norm", current.replace("float eps", "int eps"))
    with pytest.raises(ValueError, match=r"operator mom::gated_rms_norm must have the schema .*int eps.*export again"):
        export.load(changed)
    default = _damaged(folder, tmp_path / "b", "mom::gated_rms_norm", current.replace("float eps", "float eps=1e-05"))
    with pytest.raises(ValueError, match=r"must have the schema .*eps=1e-05"):
        export.load(default)
    gone = _damaged(folder, tmp_path / "c", "mom::forgotten", "mom::forgotten(Tensor x) -> Tensor")
    with pytest.raises(ValueError, match=r"operator mom::forgotten must be registered, got none; .*0\.1\.0: install"):
        export.load(gone)
    # An argument appended since then, with a default, is no difference.
    shorter = _damaged(folder, tmp_path / "d", "mom::gated_rms_norm", current.replace(", float eps", ""))
    with pytest.raises(ValueError, match="must have the schema"):  # eps has no default
        export.load(shorter)


def test_a_damaged_program(pt2_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pt2_artifact[1], tmp_path / "x"))
    (folder / "decode.pt2").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"decode\.pt2 must have the hash in manifest\.json"):
        export.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    artifact.write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=r"decode\.pt2 must open in torch .*upgrade torch, or export again"):
        export.load(folder)([[1]])
    manifest["kind"] = "tflite"
    artifact.write_manifest(folder, manifest)
    with pytest.raises(ValueError, match="kind must be one of onnx, pt2, genai, aoti, tensorrt, got 'tflite'"):
        export.load(folder)


def test_command_line(
    pt2_artifact: tuple[MoMForCausalLM, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Which model takes part compiled; what inductor makes of it, test_ladder.py has.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    pt2_artifact[0].save_pretrained(tmp_path / "checkpoint")
    target = str(tmp_path / "pt2")
    assert main(["export", str(tmp_path / "checkpoint"), target, "--to", "pt2"]) == 0
    assert main(["verify", target, "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    printed = capsys.readouterr().out
    assert "64 decode steps" in printed and "eager, compiled, pt2" in printed
    assert main(["generate", target, "--greedy", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")
