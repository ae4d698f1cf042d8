"""All artifacts of a checkpoint verified together: the table, the manifests, the conversation, the exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from models import tiny_model

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.data import tokenize
from mom_compile.evaluate import evaluate
from mom_compile.export import artifact
from mom_compile.export.ladder import converse
from mom_compile.export.text_verification import HeldOut, runner_bits_per_byte
from mom_compile.run_folder import held_out_stream
from mom_compile.tokenizer import ByteTokenizer

TEXT = "A memory that no token selects stays as it was, bit for bit. " * 40


@pytest.fixture(scope="module")
def model(small_artifact: tuple[MoMForCausalLM, Path]) -> MoMForCausalLM:
    return small_artifact[0]


@pytest.fixture(scope="module")
def run_folder(
    model: MoMForCausalLM, small_artifact: tuple[MoMForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As ``mom-compile train`` leaves it, with three artifacts beside the model."""
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    training = {"data": [str(folder / "text.txt")], "held_out": 0.2}
    (folder / "config.json").write_text(json.dumps({"train": training, "model": model.config.to_dict()}))
    export.to_pt2(model, folder / "pt2")
    shutil.copytree(small_artifact[1], folder / "fast")
    export.to_onnx(model, folder / "int8", precision="int8", text=held_out_stream(folder, 257))
    return folder


def test_a_run_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run_folder), "--no-compile"]) == 0
    out = capsys.readouterr().out
    lines = {line[: line.index("  ")]: line for line in out.splitlines() if "  " in line}
    header = lines["check"].split()
    assert [Path(name).name for name in header[1:]] == ["model", "fast", "int8", "pt2"]
    assert lines["greedy text"].count("256 tokens ok") == 2
    assert lines["bits per byte"].count("%") == 3 and lines["speed, decode"].count("x ok") == 3
    assert lines["one conversation through all of them"].count("ok") == 2  # those of float32
    assert lines["prefill logits, the model's routing forced in"].count("ok") == 1
    for name in ("fast", "int8", "pt2"):
        parity = artifact.read_manifest(run_folder / name)["parity"]
        assert parity["passed"]
        checks = {check["name"]: check for check in parity["checks"]}
        assert checks["bits per byte"]["measured"].endswith("%")
        assert ("one conversation through all of them" in checks) == (name != "int8")
    conversation = checks["one conversation through all of them"]
    assert conversation["note"] == "eager, onnxruntime, pt2" and conversation["error"] < 1e-5


def test_a_miss_is_written_down_and_exits_1(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(run_folder / "int8"), "--checkpoint", str(run_folder / "model"), "--tolerance", "1e-9"]
    assert main([*command, "--no-compile"]) == 1
    assert "FAILED" in capsys.readouterr().out
    parity = artifact.read_manifest(run_folder / "int8")["parity"]
    assert not parity["passed"] and parity["tolerance"] == 1e-9
    assert main([*command[:-2], "--no-compile"]) == 0
    assert artifact.read_manifest(run_folder / "int8")["parity"]["passed"]


def test_bits_per_byte_of_a_runner(model: MoMForCausalLM, run_folder: Path) -> None:
    stream = tokenize([TEXT], ByteTokenizer(), held_out=0).train
    expected = evaluate(model, stream, batch_size=16, seq_len=256).bits_per_byte
    assert abs(runner_bits_per_byte(export.load(run_folder / "fast"), stream) / expected - 1) < 1e-5


def test_bits_per_byte_fails_an_artifact_of_other_weights(model: MoMForCausalLM, run_folder: Path) -> None:
    stream = held_out_stream(run_folder / "model", 257)
    assert stream is not None
    other = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    other.lm_head.weight.data.mul_(0.5)
    text = HeldOut(other, stream)
    report = export.verify(run_folder / "int8", other, text=text)
    failed = {check.name for check in report.checks if not check.passed}
    assert {"prefill logits, the model's routing forced in", "64 decode steps with the same routing"} <= failed


def test_a_conversation_notices_a_wrong_speaker(model: MoMForCausalLM, run_folder: Path) -> None:
    runner = export.load(run_folder / "fast")
    assert converse([runner], model, 1e-4, compiled=False).passed
    genuine = runner._run

    def forgetful(ids: np.ndarray, state: object) -> object:
        return genuine(ids, runner.init_state(len(ids)))

    runner._run = forgetful  # type: ignore[method-assign,assignment]
    assert not converse([runner], model, 1e-4, compiled=False).passed


@pytest.mark.slow
def test_the_compiled_model_takes_part(model: MoMForCausalLM, run_folder: Path) -> None:
    check = converse([export.load(run_folder / "fast")], model, 1e-4)
    assert check.passed and check.note == "eager, compiled, onnxruntime"


def test_a_held_out_text_that_is_gone(model: MoMForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert held_out_stream(tmp_path / "model", 257) is None
    config = {"train": {"data": [str(tmp_path / "gone.txt")], "held_out": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert held_out_stream(tmp_path, 257) is None
    (tmp_path / "gone.txt").write_text(TEXT)
    stream = held_out_stream(tmp_path, 257)
    assert stream is not None and len(stream) == len(TEXT) // 10
