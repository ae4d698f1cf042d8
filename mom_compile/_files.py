"""Folders that are either written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_directory(path: str | os.PathLike[str], keep: bool = True) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of ``path`` when the block ends without an error.

    Args:
        path: the folder to write.
        keep: copy what ``path`` already holds into the new folder first, so that other files in it survive.

    An error, a full disk among them, leaves ``path`` as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory must be a folder, got the file {target}; choose another path")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if keep and target.exists():
            shutil.copytree(target, staging, dirs_exist_ok=True)
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                _sync(file)
        os.chmod(staging, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / "old")
            try:
                os.rename(staging, target)
            except OSError:
                os.rename(old / "old", target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(staging, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} must exist, got no such file; is {path.parent} the right folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}; it is damaged") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous copies of the tensors.

    Raises:
        OSError: the file could not be written, a full disk among the reasons.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            str(path),
            metadata={"format": "pt", **(metadata or {})},
        )
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(f"{path.name} could not be written: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        ValueError: no such file, or a truncated or foreign one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} must exist, got no such file; is {path.parent} the right folder?")
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}; it is truncated or damaged") from error
