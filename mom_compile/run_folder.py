"""A run folder of ``mom-compile train`` stands for the trained model inside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import read_json

if TYPE_CHECKING:
    from .data import TokenStream

MODEL = "model"
CHECKPOINT = "checkpoint"


def model_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of the model: ``directory`` itself, or ``directory/model`` where it is a run folder."""
    folder = Path(directory)
    inner = folder / MODEL
    return inner if (inner / "config.json").is_file() and not (folder / "model.safetensors").exists() else folder


def held_out_stream(directory: str | os.PathLike[str], vocab_size: int) -> TokenStream | None:
    """What the training of a run folder, or of the run folder around a model, held out.

    None where there is no such run, its text is gone, or nothing was held out.
    """
    from .data import read_texts, tokenize
    from .tokenizer import load_tokenizer

    model = model_folder(directory)
    settings = model.parent / "config.json"
    if model.name != MODEL or not settings.is_file():
        return None
    training = read_json(settings).get("train", {})
    paths = training.get("data") or []
    if not paths or not all(Path(path).exists() for path in paths):
        return None
    stream = tokenize(read_texts(paths), load_tokenizer(model, vocab_size), training["held_out"]).held_out
    return stream if len(stream) > 1 else None
