"""A run folder of ``mom-compile train`` stands for the trained model inside it."""

from __future__ import annotations

import os
from pathlib import Path

MODEL = "model"
CHECKPOINT = "checkpoint"


def model_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder of the model: ``directory`` itself, or ``directory/model`` where it is a run folder."""
    folder = Path(directory)
    inner = folder / MODEL
    return inner if (inner / "config.json").is_file() and not (folder / "model.safetensors").exists() else folder
