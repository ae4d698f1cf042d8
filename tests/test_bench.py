"""``mom-compile bench`` on tiny sizes: every command runs, its table holds what it says, bad input is named."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import tiny_config

from mom_compile import MoMForCausalLM
from mom_compile.bench.counts import forward_flops, state_bytes, weight_bytes
from mom_compile.bench.measure import median_ms, peak_flops, seconds_since_start
from mom_compile.bench.peers import load_peers, peers_folder, recorded
from mom_compile.bench.report import Table, plot_lines, read_rows, rounded
from mom_compile.bench.sizes import SIZES
from mom_compile.bench.train import Options, bench_train
from mom_compile.cli import main

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def _peer(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "peers" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operators_times_each_one_forward_and_backward(tmp_path: Path) -> None:
    command = ["bench", "operators", "--device", "cpu", "--size", "tiny", "--repeats", "1", "--peer"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "operators.csv")
    timed = {(row["operator"], row["direction"]) for row in rows if row["ms"] and float(row["ms"]) > 0}
    for name in ("permute", "grouped_linear", "short_conv", "chunk gated_delta", "combine", "gated_rms_norm"):
        assert {(name, "forward"), (name, "backward")} <= timed
    assert ("recurrent gated_delta", "forward") in timed
    assert any(row["operator"].startswith("ours chunk_gated_delta_rule") for row in rows)
    assert all(row["versions"] and row["device"] for row in rows)


def test_train_times_model_layer_and_operator(tmp_path: Path) -> None:
    command = ["bench", "train", "--device", "cpu", "--no-compile", "--shape", "2x8", "--length", "16"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "train.csv")
    assert [(row["level"], row["batch"], row["length"]) for row in rows] == [
        ("model", "2", "8"),
        ("model", "1", "16"),
        ("layer", "2", "8"),
    ]
    for row in rows:
        assert float(row["tokens_per_s"]) == pytest.approx(1e6 / float(row["us_per_token"]), rel=2e-3)
    assert (tmp_path / "train.png").stat().st_size > 0
    assert len(read_rows(tmp_path / "train-operators.csv")) == 2


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_train_goes_on_where_memory_is_short(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that does not fit is tried with policies that keep less; the next one starts with the first policy."""
    left = [failures]

    def first(step: Callable[[], object], device: torch.device) -> tuple[float, None]:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError
        step()
        return 0.0, None

    monkeypatch.setattr("mom_compile.bench.train._first", first)
    options = Options("tiny", [(1, 16), (1, 8)], compile=False, memory="save", repeats=1, operators=False)
    rows = [row for row in bench_train(options, torch.device("cpu")).rows if row["level"] == "model"]
    notes = {1: "eager, memory block:1", 2: "eager, memory block", 3: "out of memory"}
    assert [row["note"] for row in rows] == [notes[failures], "eager, memory save"]


def test_decode_on_a_cpu_stands_beside_the_limit(tmp_path: Path) -> None:
    command = ["bench", "decode", "--device", "cpu", "--size", "tiny", "--forms", "eager", "--prompt", "8"]
    assert main([*command, "--no-touched", "--out", str(tmp_path)]) == 0
    decode, prefill = read_rows(tmp_path / "decode-cpu-tiny.csv")
    assert decode["what"] == "decode" and 0 < float(decode["of_limit"])
    assert prefill["what"] == "prefill of 8" and prefill["of_limit"] == ""


def test_decode_of_touched_states_and_of_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from mom_compile.bench.decode_cpu import COLUMNS, touched_rows

    table = Table(COLUMNS, {})
    touched_rows(table, 16, 1, heads=2, dim=8, memories=4, repeats=1)
    assert [row["form"] for row in table.rows][:3] == ["whole", "one buffer", "touched"]
    assert table.rows[0]["times_first"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["operators", "--size", "huge"], "size must be one of 512m, small, tiny, got 'huge'"),
        (["operators", "--rule", "mamba9"], "rule must be one of linear, .*, got 'mamba9'"),
        (["train", "--size", "huge"], "size must be one of tiny, 50m, 512m, 1b, got 'huge'"),
        (["train", "--shape", "8by2048"], "shape must be BATCHxLENGTH, got '8by2048'; for example 8x2048"),
        (["decode", "--forms", "magic"], "forms must be of eager, compiled, onnxruntime, got 'magic'"),
        (["decode", "--device", "tpu"], "device must be cuda or cpu, got 'tpu'"),
        (["train", "--peers", "nowhere"], "peers must be a folder of adapters, got 'nowhere'"),
    ],
)
def test_bad_input(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert main(["bench", *arguments]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_the_flop_of_a_pass_are_those_of_its_weights() -> None:
    """All memories selected, no rule and no convolution to speak of: two per weight and token."""
    config = tiny_config("linear", vocab_size=512, topk=4, num_memories=4, use_short_conv=False)
    model = MoMForCausalLM(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - model.model.embeddings.weight.numel()
    rule = config.num_hidden_layers * 5 * config.value_heads * 4 * config.head_dim * config.value_dim
    assert forward_flops(config, 3) == 3 * (2 * matrices + rule)


def test_bytes() -> None:
    config = tiny_config(topk=2, num_memories=4)
    assert (
        state_bytes(config, 3, torch.float32) == 2 * 3 * 3 * config.value_heads * config.head_dim * config.value_dim * 4
    )
    model = MoMForCausalLM(config)
    everything = sum(p.numel() * 4 for p in model.parameters())
    assert weight_bytes(model) == everything - model.model.embeddings.weight.numel() * 4


def test_recorded_figures_are_found_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peers_folder(None)
    assert folder is not None and not list(recorded(folder, CPU, what="decode"))
    monkeypatch.setattr("mom_compile.bench.peers.device_name", lambda device: "NVIDIA H200")
    rows = list(recorded(folder, CPU, what="decode", size="512m"))
    assert {(row["model"], row["batch"], row["ms"]) for row in rows} >= {("fla MoM", "1", "166")}
    assert all(row["versions"] and row["date"] for row in rows)


def test_a_peer_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.py").write_text("NAME = 'one'\ndef missing(): return 'no such chip'\ndef layer(*x): pass\n")
    assert not list(load_peers(tmp_path, "layer"))
    assert "one is not timed: no such chip" in capsys.readouterr().out
    assert not list(load_peers(tmp_path, "decoder")) and not capsys.readouterr().out


@pytest.mark.parametrize("name", SIZES)
def test_the_transformer_has_as_many_parameters(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = MoMForCausalLM(SIZES[name]), _peer("transformer").Transformer(SIZES[name])
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_the_transformer_reads_its_cache() -> None:
    peer, config = _peer("transformer"), tiny_config(hidden_size=128, vocab_size=64)
    step, moved = peer.decoder(config, CPU, torch.float32, compile=False)(2, 5)
    logits = step()
    assert logits.shape == (2, 64) and torch.isfinite(logits).all()
    caches = 2 * config.num_hidden_layers * 2 * 128 * 5 * 4
    assert moved > caches


def test_a_table_refuses_an_unknown_column() -> None:
    with pytest.raises(ValueError, match="a row must hold the columns ms, got seconds; add them"):
        Table({"ms": 5}, {}).add(seconds=1)


def test_measures() -> None:
    calls: list[int] = []
    assert median_ms(lambda: calls.append(1), CPU, repeats=3, inner=2, warm_up=1) >= 0
    assert len(calls) == 7
    assert peak_flops(CPU) is None
    start = seconds_since_start()
    assert start is None or start > 0
    assert rounded(1234.5678) == 1235 and rounded(0.00123456) == 0.001235 and rounded("x") == "x"
    assert not plot_lines(Path("unused.png"), {"nothing": []}, "", "", "")
