"""``mom-compile inspect``: the facts of a folder, and the memories of a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import tiny_model

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.memory_use import memory_use_of_model, memory_use_of_runner, memory_use_table


def test_an_onnx_artifact(
    small_artifact: tuple[MoMForCausalLM, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, folder = small_artifact
    plot = tmp_path / "use.png"
    assert main(["inspect", str(folder), "--text", "cost: $5\n", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "onnx artifact, target onnxruntime, state layout 1" in out
    assert "1 layers of width 32, 4 memories, 2 per token and a shared one, gated_delta, vocabulary 257" in out
    assert "parity: passed, largest relative error" in out and "onnxruntime 1." in out
    assert "prefill.onnx (prefill, opsets ai.onnx 20, com.microsoft 1)" in out
    assert "past_key_values.0.recurrent_state  float32  [batch, 10, 8, 8]" in out
    assert "com.microsoft::LinearAttention 1" in out and "weights.bin" in out and "KiB" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = out[out.index("\ntoken ") + 1 :].splitlines()
    chosen = memory_use_of_model(model, list(b"cost: $5\n"))[0]
    assert table[1] == "'c'    " + " ".join(map(str, np.flatnonzero(chosen[0])))
    assert table[9].startswith(r"'\n'") and "layer 0: memory 0 " in table[11]


def test_pt2_and_a_checkpoint(
    pt2_artifact: tuple[MoMForCausalLM, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, folder = pt2_artifact
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "pt2 artifact" in out and "decode.pt2 (decode)" in out and "mom::decode_step 1" in out
    model.save_pretrained(tmp_path / "checkpoint")
    assert main(["inspect", str(tmp_path / "checkpoint"), "--text", "ab"]) == 0
    out = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in out
    assert "model.layers.0.attn.kv_proj" in out and "F32" in out and "'b'" in out


def test_a_state_tells_what_the_router_chose(pt2_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = pt2_artifact
    ids = list(b"the same memories, seen from two sides")
    expected = memory_use_of_model(model, ids)
    assert (expected.sum(2) == 2).all()
    assert np.array_equal(memory_use_of_runner(export.load(folder), ids), expected)


def test_the_table() -> None:
    use = np.zeros((2, 2, 12), bool)
    use[0, 0, [1, 11]] = use[0, 1, [0, 2]] = use[1, :, [3, 10]] = True
    assert memory_use_table(use, ["a", "bc"]).splitlines()[:3] == [
        "token  layer 0  layer 1",
        "'a'     1 11     3 10",
        "'bc'    0  2     3 10",
    ]


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--plot", "x.png"]) == 2
    assert "--plot must go with --text" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--text", "x"]) == 2
    assert "must hold a tokenizer.json for its vocabulary of 50 entries" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "model.safetensors must exist" in capsys.readouterr().err
