"""Training checkpoints: everything that an exact resume needs, without pickle, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import atomic_directory, read_json, read_safetensors, write_json, write_safetensors
from .model import MoMForCausalLM
from .pretrained import CONFIG_FILE, WEIGHTS_FILE, from_pretrained, write_model
from .tokenizer import Tokenizer

OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"
CHECKPOINT_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; with the seed it also says which windows come next.
        elapsed: seconds of training so far.
        best_bits: lowest held-out bits per byte so far, or None.
        data_fingerprint: of the tokenized text, see :class:`mom_compile.data.TextData`.
        config: the run's ``TrainConfig`` as plain values.
    """

    step: int
    elapsed: float
    best_bits: float | None
    data_fingerprint: str
    config: dict[str, Any]


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: MoMForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    tokenizer: Tokenizer,
) -> None:
    """Write a checkpoint folder, which ``from_pretrained``, ``generate`` and ``export`` read as well.

    Args:
        directory: replaced as a whole. On any error, a full disk among them, it is left as it was.
        model: with all parameters of ``optimizer``.
        optimizer: AdamW; its moments and steps are written by the parameters' names.
        state: where the run stands; torch's random state is added.
        tokenizer: saved beside the model.
    """
    tensors = _optimizer_tensors(model, optimizer)
    tensors["rng.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    with atomic_directory(directory, keep=False) as folder:
        write_model(model, folder)
        write_safetensors(folder / OPTIMIZER_FILE, tensors)
        tokenizer.save(folder)
        write_json(
            folder / TRAINER_FILE,
            {
                "version": CHECKPOINT_VERSION,
                "step": state.step,
                "elapsed": state.elapsed,
                "best_bits": state.best_bits,
                "data_fingerprint": state.data_fingerprint,
                "config": state.config,
            },
        )


def read_trainer_state(directory: str | os.PathLike[str]) -> TrainerState:
    """The trainer.json of a checkpoint folder.

    Raises:
        ValueError: the folder or the file is missing or damaged, or of another version.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, got {str(folder)!r}; no run was saved there")
    path = folder / TRAINER_FILE
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != CHECKPOINT_VERSION:
        version = values.get("version") if isinstance(values, dict) else None
        raise ValueError(
            f"{path} must be of version {CHECKPOINT_VERSION}, got {version}; resume with the version it is of"
        )
    try:
        state = TrainerState(
            values["step"], values["elapsed"], values["best_bits"], values["data_fingerprint"], values["config"]
        )
    except KeyError as error:
        raise ValueError(f"{path} must hold {error}, got a file without it; it is damaged") from None
    if not isinstance(state.step, int) or state.step < 0 or not isinstance(state.config, dict):
        raise ValueError(f"{path} must hold a step of at least 0 and a config, got {state.step!r}; it is damaged")
    return state


def load_model(directory: str | os.PathLike[str], device: torch.device | str | None = None) -> MoMForCausalLM:
    """The model of a checkpoint folder, in training mode."""
    return from_pretrained(directory, device=device).train()


def load_optimizer(
    directory: str | os.PathLike[str], model: MoMForCausalLM, optimizer: torch.optim.Optimizer, restore_rng: bool = True
) -> None:
    """Fill a fresh optimizer of ``model`` with a checkpoint's moments, and set torch's random state.

    Raises:
        ValueError: a missing, truncated or mismatched file; the text names the tensor.
    """
    path = Path(directory) / OPTIMIZER_FILE
    tensors = read_safetensors(path)
    rng = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
    names = _names(model, optimizer)
    expected = {f"{moment}.{name}" for name in names.values() for moment in _MOMENTS}
    if tensors and set(tensors) != expected:  # no tensors at all: the run had not taken a step
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        what = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
        raise ValueError(
            f"{path} must hold the state of the parameters in {WEIGHTS_FILE}, but it {what}; "
            f"it belongs to another model than {CONFIG_FILE}"
        )
    for parameter, name in names.items():
        if not tensors:
            break
        values = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        for moment in _MOMENTS[:2]:
            if values[moment].shape != parameter.shape:
                raise ValueError(
                    f"{moment}.{name} must have shape {tuple(parameter.shape)}, got {tuple(values[moment].shape)} in "
                    f"{path}; it belongs to another model"
                )
        optimizer.state[parameter] = {
            key: value.to(parameter.device, torch.float32 if key == "step" else parameter.dtype)
            for key, value in values.items()
        }
    if restore_rng and "rng.cpu" in rng:
        torch.set_rng_state(rng["rng.cpu"])
        if "rng.cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["rng.cuda"])


def _names(model: MoMForCausalLM, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {parameter: names[parameter] for group in optimizer.param_groups for parameter in group["params"]}


def _optimizer_tensors(model: MoMForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": values[moment]
        for parameter, name in _names(model, optimizer).items()
        for values in [optimizer.state.get(parameter, {})]
        for moment in _MOMENTS
        if moment in values
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: tuples become lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
