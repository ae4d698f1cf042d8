"""The demonstration's parts, and the whole of it in small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from models import tiny_config

import mom_compile.demo as demo
from mom_compile import export, report
from mom_compile.cli import main
from mom_compile.demo import Report, demo_folder, demo_model, demo_training, interpreter_text


def test_the_interpreters_documentation_is_the_same_every_time_and_quotes_nothing_twice() -> None:
    text = interpreter_text()
    paragraphs = text.strip("\n").split("\n\n")
    assert text == interpreter_text() and len(text.encode()) > 200_000
    assert len(paragraphs) == len(set(paragraphs))


def test_the_table_marks_what_is_required() -> None:
    report = Report()
    report.add("bits", "2.0", True, "at most 3")
    report.add("speed", "fast")
    assert report.passed
    report.add("worth", "0.01", False, "at least 0.05")
    assert not report.passed
    assert report.table().splitlines() == [
        "bits   2.0   pass  at most 3",
        "speed  fast",
        "worth  0.01  FAIL  at least 0.05",
    ]


def test_the_folder_is_replaced_only_if_it_is_a_demonstrations(tmp_path: Path) -> None:
    with demo_folder(tmp_path / "demo", keep=True) as folder:
        (folder / "old").touch()
    with demo_folder(tmp_path / "demo", keep=False) as folder:
        assert not (folder / "old").exists()
    with pytest.raises(ValueError, match="out must be a new folder with --keep, got .*demo'; choose another"):
        with demo_folder(tmp_path / "demo", keep=True):
            pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="out must be a new folder, got .*mine' with other files in it"):
        with demo_folder(tmp_path / "mine", keep=False):
            pass
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("learned", [True, False])
def test_the_whole_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], learned: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(400)))
    exported: list[str] = []
    genuine = export.to_onnx

    def to_onnx(model: Any, folder: Path, target: str) -> report.Report:
        exported.append(target)
        if learned and target == demo.TARGETS[0]:  # the one that generates is exported in earnest
            return genuine(model, folder, target=target)
        return report.Report(target, 1e-4, (report.Check("logits", 1e-6, True),))

    def training(out: str, seconds: float) -> Any:
        return dataclasses.replace(
            demo_training(out, seconds), compile="none", progress=False, batch_size=4, seq_len=32
        )

    monkeypatch.setattr(export, "to_onnx", to_onnx)
    if not learned:
        monkeypatch.setattr(demo, "_generate", lambda folder, tokenizer: ("The sample", 1000.0))
    monkeypatch.setattr(demo, "demo_training", training)
    monkeypatch.setattr(demo, "demo_model", lambda: tiny_config(vocab_size=257, num_hidden_layers=1))
    monkeypatch.setattr(demo, "DECODED", 3)
    if learned:  # a second teaches nothing: judge by what holds anyway
        monkeypatch.setattr(demo, "BELOW_BIGRAM", -9.0)
        monkeypatch.setattr(demo, "WORTH", -9.0)
        monkeypatch.setattr(demo, "SHARE", (0.0, 1.0))
    code = main(["demo", "--text", str(text), "--out", str(tmp_path / "demo"), "--seconds", "0.5"])
    printed = capsys.readouterr().out
    assert exported == list(demo.TARGETS)
    assert code == (0 if learned else 1)
    assert ("all requirements hold" if learned else "not as required: bits/byte after training") in printed
    for what in ("parameters", "bigram", "trigram", "memory shares of layer 0", "parity of portable", "loss.png"):
        assert what in printed
    assert "not measured: turned off" in printed and "The " in printed
    if learned:
        assert export.verify(tmp_path / "demo" / "onnxruntime").passed


def test_the_demonstrations_settings() -> None:
    config = demo_training("runs/demo", 150)
    assert config.max_seconds == 150 and config.max_steps is None
    assert demo_model().vocab_size == 257
