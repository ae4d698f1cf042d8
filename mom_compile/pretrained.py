"""Checkpoint folders: config.json and model.safetensors, written whole or not at all, read without pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._files import atomic_directory, read_json, read_safetensors, write_json, write_safetensors
from .config import MoMConfig
from .fla_checkpoint import convert_fla_checkpoint, is_fla_checkpoint
from .run_folder import model_folder

if TYPE_CHECKING:
    from .model import MoMForCausalLM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_model(model: MoMForCausalLM, folder: Path) -> None:
    """Write the two files into an existing folder."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_json(folder / CONFIG_FILE, model.config.to_dict())
    write_safetensors(folder / WEIGHTS_FILE, tensors)


def save_pretrained(model: MoMForCausalLM, directory: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors.

    Args:
        model: its parameters are written in their own dtypes.
        directory: made if missing; other files in it stay. On any error, a full disk among them, it is left as it was.
    """
    with atomic_directory(directory) as folder:
        write_model(model, folder)


def from_pretrained(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MoMForCausalLM:
    """Read a checkpoint folder, ours or flash-linear-attention's ``MomForCausalLM``.

    Args:
        directory: holds config.json and model.safetensors (or its shards with an index); a run folder of
            ``mom-compile train`` stands for its model.
        device: where the parameters go; the CPU by default.
        dtype: their dtype; None keeps that of the file.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: a missing, truncated or mismatched file; the text names the tensor.
    """
    from .model import MoMForCausalLM

    folder = model_folder(directory)
    if not folder.is_dir():
        raise ValueError(f"directory must be a checkpoint folder, got {str(folder)!r}; no such folder exists")
    config = MoMConfig.from_dict(read_json(folder / CONFIG_FILE))
    tensors = _read_weights(folder)
    if is_fla_checkpoint(tensors):
        tensors = convert_fla_checkpoint(tensors, config)
    with torch.device("meta"):
        model = MoMForCausalLM(config)
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("model.embeddings.weight", torch.empty(0)))
    expected = model.state_dict()
    _check_names(folder, expected, tensors)
    tensors = {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS_FILE).exists() or not (folder / INDEX_FILE).exists():
        return read_safetensors(folder / WEIGHTS_FILE)
    shards = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors.update(read_safetensors(folder / shard))
    return tensors


def _check_names(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing or extra:
        parts = [
            f"{label} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for label, names in (("lacks", missing), ("has the unknown", extra))
            if names
        ]
        raise ValueError(
            f"{folder / WEIGHTS_FILE} must hold the tensors of its config.json, but it {' and '.join(parts)}; "
            "the two files belong to different models, or one is damaged"
        )
    for name, want in expected.items():
        if found[name].shape != want.shape:
            raise ValueError(
                f"{name} must have shape {tuple(want.shape)} by config.json, got {tuple(found[name].shape)}; "
                "the two files belong to different models"
            )
