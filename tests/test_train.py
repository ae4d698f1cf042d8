"""Training: exact resume, interruption, records, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_config

from mom_compile import MoMForCausalLM
from mom_compile.captured_step import CapturedStep
from mom_compile.cli import main
from mom_compile.data import TextData, tokenize
from mom_compile.evaluate import evaluate
from mom_compile.optim import learning_rate_at, make_adamw, parameter_groups
from mom_compile.tokenizer import ByteTokenizer
from mom_compile.train import TrainConfig, Trainer, compiler_problem

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def make(out: Path, resume: bool = False, data: TextData | None = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "out": str(out),
        "batch_size": 4,
        "seq_len": 24,
        "max_steps": 4,
        "warmup_steps": 2,
        "held_out": 0.1,
        "log_every": 1,
        "compile": "none",
        "progress": False,
        "device": "cpu",
    }
    config = TrainConfig(**{**settings, **changes})
    model_config = tiny_config(vocab_size=257, num_hidden_layers=1, initializer_range=0.02)
    data = data or tokenize([TEXT], ByteTokenizer(), config.held_out)
    return Trainer(config, None if resume else model_config, resume=resume, data=data, say=lambda message: None)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    losses = [whole.train_step().loss for _ in range(4)]
    half = make(tmp_path / "half")
    first = [half.train_step().loss for _ in range(2)]
    half.save()
    torch.manual_seed(99)
    again = make(tmp_path / "half", resume=True)
    assert again.step == 2
    assert first + [again.train_step().loss for _ in range(2)] == losses
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(again)[name]), name
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        for key, value in whole.optimizer.state[a].items():
            assert torch.equal(value, again.optimizer.state[b][key]), key


def test_training_learns_and_leaves_its_records(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", max_steps=30, learning_rate=1e-2, log_every=5, eval_every=10, save_every=10)
    assert trainer.run()
    folder = tmp_path / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 5, 10, 15, 20, 25, 30]
    assert steps[0]["bits_per_byte"] == pytest.approx(8, abs=0.1) and steps[-1]["bits_per_byte"] < 5
    assert steps[-1]["bits_per_byte"] == pytest.approx(steps[-1]["loss"] / math.log(2))
    assert set(steps[0]) == {
        "step", "loss", "aux_loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "elapsed",
        "memory_shares",
    }  # fmt: skip
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for r in steps for layer in r["memory_shares"])
    held_out = [r["held_out_bits_per_byte"] for r in records if "held_out_bits_per_byte" in r]
    assert len(held_out) == 3 and trainer.best_bits == min(held_out)
    assert json.loads((folder / "config.json").read_text())["model"]["vocab_size"] == 257
    for name in ("loss.png", "memories.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for name in ("model", "checkpoint"):
        MoMForCausalLM.from_pretrained(folder / name)
    assert not list(folder.glob(".*"))


def test_ctrl_c_saves_and_names_the_command_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "whole")
    assert whole.run()
    messages: list[str] = []
    trainer = make(tmp_path / "a run")
    trainer.say = messages.append
    windows = trainer.sampler.windows

    def interrupted(step: int) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return windows(step)

    monkeypatch.setattr(trainer.sampler, "windows", interrupted)
    assert not trainer.run()
    assert trainer.step == 2 and (tmp_path / "a run" / "model" / "config.json").exists()
    assert f"mom-compile train --out '{tmp_path}/a run' --resume" in messages[-1]
    again = make(tmp_path / "a run", resume=True)
    assert again.run()
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(again)[name]), name
    steps = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "loss" in r] == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)

    def interrupted(step: int) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.sampler, "windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    norms = []
    for parts in (1, 4):
        trainer = make(tmp_path / str(parts), accumulate=parts)
        trainer.model.config.aux_loss_scale = 0.0  # the balance loss is no mean over windows
        norms.append(trainer.train_step().grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_time_budget_ends_a_run_and_its_learning_rate(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", max_steps=None, max_seconds=0.5)
    assert trainer.run()
    assert trainer.elapsed >= 0.5 and trainer.learning_rate() == pytest.approx(trainer.config.learning_rate * 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run")
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.inf
    before = parameters(trainer)["model.embeddings.weight"]
    with pytest.raises(ValueError, match=r"loss and gradients must be finite, got loss .* at step 0; lower --learn"):
        trainer.train_step()
    assert torch.equal(before, parameters(trainer)["model.embeddings.weight"])


def test_what_a_resumed_run_refuses(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint must be a folder, got .*no run was saved there"):
        make(tmp_path / "none", resume=True)
    trainer.save()
    with pytest.raises(ValueError, match="out must be the folder of a new run, got .*pass --resume"):
        make(tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size must stay 4 in a resumed run, got 8; start a new run"):
        make(tmp_path / "run", resume=True, batch_size=8)
    with pytest.raises(ValueError, match="data must be the text that the run in .* began with, got another"):
        make(tmp_path / "run", resume=True, data=tokenize([TEXT + "!"], ByteTokenizer(), 0.1))
    make(tmp_path / "run", resume=True, max_steps=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "accumulate": 3}, "accumulate must divide batch_size = 4, got 3"),
        ({"max_steps": None}, "max_steps must be given where max_seconds is not"),
        ({"max_steps": -1}, "max_steps must be positive, got -1"),
        ({"max_seconds": 0}, "max_seconds must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"final_ratio": 2}, r"final_ratio must lie in \[0, 1\], got 2"),
        ({"clip": -1.0}, "clip must be at least 0, got -1.0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_other_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config must hold known settings, got speed; it is of another version"):
        TrainConfig.from_dict({"speed": 9})
    data = tokenize([TEXT], ByteTokenizer())
    with pytest.raises(ValueError, match="model_config must be given for a new run"):
        Trainer(TrainConfig(out=str(tmp_path / "x"), device="cpu"), data=data)
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's 257, got 50"):
        Trainer(TrainConfig(out=str(tmp_path / "x"), device="cpu"), tiny_config(), data=data)


def test_weight_decay_spares_vectors_embeddings_and_convolutions() -> None:
    model = MoMForCausalLM(tiny_config(tie_word_embeddings=True))
    decay, keep = parameter_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0
    names = {name.rsplit(".", 1)[-1] for name in keep["names"]}
    assert {"A_log", "dt_bias", "conv1d"} <= names and "model.embeddings.weight" in keep["names"]
    assert all(p.dim() > 1 for p in decay["params"])
    assert len(decay["params"]) + len(keep["params"]) == len(list(model.parameters()))
    assert len(make_adamw(model, 1e-3, 0.1).param_groups) == 2


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, step / 100, 1.0, 10, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and rates[100] == pytest.approx(0.1)
    assert max(rates) == rates[9] and all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate_at(0, 5.0, 1.0, 0, 0.1) == pytest.approx(0.1)


def test_without_a_compiler_training_runs_eagerly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mom_compile.train as module

    monkeypatch.setattr(module, "compiler_problem", lambda device: "no C++ compiler was found")
    messages: list[str] = []
    data = tokenize([TEXT], ByteTokenizer())
    config = TrainConfig(out=str(tmp_path / "run"), device="cpu", batch_size=2, seq_len=8, progress=False)
    trainer = Trainer(config, tiny_config(vocab_size=257), data=data, say=messages.append)
    assert messages == ["not compiling: no C++ compiler was found; training runs eagerly, which is slower"]
    assert not trainer.compiled
    trainer.train_step()


def test_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert "no C++ compiler was found, which torch.compile needs" in str(compiler_problem("cpu"))


@pytest.mark.skipif(compiler_problem("cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["block", "model"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_are_the_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, what: str
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager, compiled = make(tmp_path / "eager"), make(tmp_path / "compiled", compile=what, memory="selective")
    assert compiled.compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    evaluate(compiled.model, compiled.data.held_out, batch_size=2, seq_len=7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # evaluation stays eager
    for _ in range(3):
        a, b = eager.train_step(), compiled.train_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-4) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    sizes = "--hidden-size 32 --num-layers 1 --num-heads 1 --head-dim 8 --batch-size 2 --seq-len 16".split()
    options = ["--out", str(out), "--compile", "none", "--memory", "block", "--no-progress"]
    assert main(["train", "--data", str(text), *options, *sizes, "--max-steps", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    assert main(["train", *options, "--resume"]) == 2
    assert "raise --max-steps" in capsys.readouterr().err
    assert main(["train", *options, "--resume", "--max-steps", "3"]) == 0
    assert main(["train", *options, "--resume", "--hidden-size", "64"]) == 2
    assert "hidden_size must be left out with --resume" in capsys.readouterr().err
    assert main(["train", "--out", str(tmp_path / "new")]) == 2
    assert "--data must name the text" in capsys.readouterr().err
    assert main(["eval", str(out / "model"), "--data", str(text), "--reset-every", "16"]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "memories, layer 0" in printed


def test_a_missing_extra_is_named_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'matplotlib must be installed.*run: pip install "mom-compile\[train\]"'):
        make(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'tqdm must be installed.*run: pip install "mom-compile\[train\]"'):
        make(tmp_path / "run")


def test_bf16_autocast_leaves_the_weights_in_float32(tmp_path: Path) -> None:
    full, half = make(tmp_path / "full"), make(tmp_path / "half", bf16=True)
    a, b = full.train_step(), half.train_step()
    assert a.loss == pytest.approx(b.loss, rel=1e-2) and a.loss != b.loss
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert {v.dtype for s in half.optimizer.state.values() for v in s.values()} == {torch.float32}


def test_training_with_a_tokenizer_file_counts_bytes_exactly(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    config = TrainConfig(
        data=[str(tmp_path / "text.txt")], out=str(tmp_path / "run"), tokenizer=str(tmp_path / "tokenizer.json"),
        batch_size=2, seq_len=16, max_steps=2, compile="none", device="cpu", progress=False,
    )  # fmt: skip
    trainer = Trainer(config, tiny_config(vocab_size=280), say=lambda message: None)
    assert trainer.data.train.num_bytes + trainer.data.held_out.num_bytes == len(TEXT)
    result = trainer.train_step()
    assert 32 < result.num_bytes and result.num_tokens == 32
    assert result.bits_per_byte == pytest.approx(result.loss * 32 / math.log(2) / result.num_bytes)
    trainer.save()
    (tmp_path / "tokenizer.json").unlink()
    again = Trainer(config, resume=True, say=lambda message: None)  # the checkpoint has a copy
    assert again.tokenizer.name == "tokenizers" and again.step == 1
    assert again.run() and (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_a_step_is_captured_on_a_gpu_alone() -> None:
    with pytest.raises(ValueError, match="CUDA device"):
        CapturedStep(lambda x: (x,), [], torch.zeros(1))
