"""Checkpoints: ours and flash-linear-attention's, damaged ones, a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from models import VARIANTS, tiny_model, tokens
from safetensors.torch import load_file, save_file
from support import assert_close, relative

from mom_compile import MoMForCausalLM, _files
from mom_compile.cli import main

FLA = Path(__file__).parent / "data" / "fla-mom-tiny"


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path: Path, variant: str, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "a")
    again = MoMForCausalLM.from_pretrained(tmp_path / "a")
    ids = tokens(2, 20)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embeddings.weight) == tied
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors"}


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "portable"])
def test_fla_checkpoint(form: str) -> None:
    model = MoMForCausalLM.from_pretrained(FLA)
    expected = load_file(FLA / "expected.safetensors")
    ids, logits = expected["input_ids"], expected["logits"]
    assert relative(model(ids, form=form).logits, logits) < 1e-5
    state = model(ids[:, :20]).state
    for t in range(20, 48):
        out = model(ids[:, t : t + 1], state=state)
        state = out.state
        assert_close(out.logits[:, 0], logits[:, t], 1e-5, f"token {t}")
    assert relative(torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits, logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_fla_checkpoint_compiled() -> None:
    model = torch.compile(MoMForCausalLM.from_pretrained(FLA), fullgraph=True)
    expected = load_file(FLA / "expected.safetensors")
    assert relative(model(expected["input_ids"]).logits, expected["logits"]) < 1e-5


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "config.json").write_text('{"train": {}}')
    assert MoMForCausalLM.from_pretrained(tmp_path).config == model.config


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FLA), str(tmp_path / "ours")]) == 0
    assert "update rule gated_delta" in capsys.readouterr().out
    names = load_file(tmp_path / "ours" / "model.safetensors")
    assert "model.layers.0.attn.kv_proj" in names and "model.layers.0.attn.k_proj.0.weight" not in names
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "b")]) == 2
    assert "directory must be a checkpoint folder" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "c")
    before = (tmp_path / "c" / "model.safetensors").read_bytes()

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mom_compile.pretrained.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    MoMForCausalLM.from_pretrained(tmp_path / "c")


def test_messages(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    tiny_model().save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file, .* it is truncated or damaged"):
        MoMForCausalLM.from_pretrained(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = tensors.pop("model.layers.1.attn.A_log")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="lacks model.layers.1.attn.A_log; the two files belong to different models"):
        MoMForCausalLM.from_pretrained(folder)
    save_file({**tensors, "model.layers.1.attn.A_log": lost[:1].clone()}, weights)
    with pytest.raises(ValueError, match=r"A_log must have shape \(2,\) by config.json, got \(1,\)"):
        MoMForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be JSON"):
        MoMForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type must be mom, got 'llama'"):
        MoMForCausalLM.from_pretrained(folder)
    fla = load_file(FLA / "model.safetensors")
    del fla["model.layers.1.attn.k_proj.2.weight"]
    save_file(fla, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FLA / "config.json").read_text())
    with pytest.raises(ValueError, match="the checkpoint must hold model.layers.1.attn.k_proj.2.weight, got none"):
        MoMForCausalLM.from_pretrained(tmp_path)


def test_atomic_directory_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="directory must be a folder"), _files.atomic_directory(tmp_path / "x"):
        pass
