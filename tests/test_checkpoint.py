"""Training checkpoints: what they hold, what they refuse, and a disk that fills up."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_config, tokens
from safetensors.torch import load_file, save_file

from mom_compile import MoMForCausalLM
from mom_compile.checkpoint import (
    OPTIMIZER_FILE,
    TRAINER_FILE,
    TrainerState,
    load_model,
    load_optimizer,
    read_trainer_state,
    save_checkpoint,
)
from mom_compile.optim import make_adamw
from mom_compile.tokenizer import ByteTokenizer


def trained(steps: int = 1) -> tuple[MoMForCausalLM, torch.optim.Optimizer]:
    model = MoMForCausalLM(tiny_config(num_hidden_layers=1))
    optimizer = make_adamw(model, 1e-3, 0.1)
    ids = tokens(2, 12)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model, optimizer


def state(step: int = 1) -> TrainerState:
    return TrainerState(step, 2.5, 1.75, "abc", {"seed": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", *trained(), state(), ByteTokenizer())
    return tmp_path / "checkpoint"


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer, state(), ByteTokenizer())
    expected = torch.rand(3)
    assert read_trainer_state(tmp_path / "c") == state()
    again = load_model(tmp_path / "c")
    assert again.training
    fresh = make_adamw(again, 1e-3, 0.1)
    load_optimizer(tmp_path / "c", again, fresh)
    assert torch.equal(torch.rand(3), expected), "the random state came back"
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert set(fresh.state[b]) == set(optimizer.state[a])
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]) and value.dtype == fresh.state[b][key].dtype


def test_no_pickle_and_nothing_left_behind(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "optimizer.safetensors", "trainer.json",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_before_the_first_step(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_checkpoint(tmp_path / "c", model, optimizer, state(0), ByteTokenizer())
    again = load_model(tmp_path / "c")
    fresh = make_adamw(again, 1e-3, 0.1)
    load_optimizer(tmp_path / "c", again, fresh)
    assert not fresh.state


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_refused(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} must be a whole safetensors file, got .*truncated or damaged"):
        model = load_model(folder)
        load_optimizer(folder, model, make_adamw(model, 1e-3, 0.1))


def test_another_models_optimizer_is_refused(folder: Path) -> None:
    model = load_model(folder)
    tensors = load_file(folder / OPTIMIZER_FILE)
    removed = tensors.pop("exp_avg.lm_head.weight")
    save_file(tensors, folder / OPTIMIZER_FILE)
    with pytest.raises(ValueError, match="but it lacks exp_avg.lm_head.weight; it belongs to another model"):
        load_optimizer(folder, model, make_adamw(model, 1e-3, 0.1))
    save_file({**tensors, "exp_avg.lm_head.weight": removed[:-1]}, folder / OPTIMIZER_FILE)
    with pytest.raises(ValueError, match=r"exp_avg.lm_head.weight must have shape \(50, 32\), got \(49, 32\)"):
        load_optimizer(folder, model, make_adamw(model, 1e-3, 0.1))
    save_file({**tensors, "exp_avg.lm_head.weight": removed, "exp_avg.other": removed.clone()}, folder / OPTIMIZER_FILE)
    with pytest.raises(ValueError, match="but it has the unknown exp_avg.other"):
        load_optimizer(folder, model, make_adamw(model, 1e-3, 0.1))


def test_a_damaged_trainer_file_is_refused(folder: Path) -> None:
    path = folder / TRAINER_FILE
    values = json.loads(path.read_text())
    for changed, message in [
        ({**values, "version": 9}, "trainer.json must be of version 1, got 9"),
        (
            {k: v for k, v in values.items() if k != "elapsed"},
            "trainer.json must hold 'elapsed', got a file without it",
        ),
        ({**values, "step": -1}, "trainer.json must hold a step of at least 0 and a config, got -1"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            read_trainer_state(folder)
    path.write_text(json.dumps(values)[:-9])
    with pytest.raises(ValueError, match="trainer.json must be JSON, got .*it is damaged"):
        read_trainer_state(folder)
    path.unlink()
    with pytest.raises(ValueError, match="trainer.json must exist, got no such file"):
        read_trainer_state(folder)
    with pytest.raises(ValueError, match="checkpoint must be a folder, got .*no run was saved there"):
        read_trainer_state(folder / "nothing")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_full_disk_keeps_the_checkpoint_before(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    import mom_compile.checkpoint as checkpoint
    import mom_compile.pretrained as pretrained

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(original: Any) -> Any:
        def write(path: Path, *rest: Any, **options: Any) -> None:
            if path.name == file:
                path.write_bytes(b"half a f")
                raise OSError(errno.ENOSPC, "No space left on device")
            original(path, *rest, **options)

        return write

    for module in (checkpoint, pretrained):
        monkeypatch.setattr(module, "write_safetensors", full(module.write_safetensors))
        monkeypatch.setattr(module, "write_json", full(module.write_json))
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(folder, *trained(2), state(2), ByteTokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_a_write_that_the_system_refuses_is_an_os_error(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    before = (folder / "model.safetensors").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, optimizer = trained(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError):
            save_checkpoint(folder, model, optimizer, state(2), ByteTokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (folder / "model.safetensors").read_bytes() == before and read_trainer_state(folder).step == 1
