"""What every target shares when it writes: the folder, the tokenizer, the manifest, and the verification before all."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._files import atomic_directory
from ..model import MoMForCausalLM
from ..state import layer_shapes
from ..tokenizer import BYTE_VOCAB_SIZE
from .artifact import check_replaceable, write_manifest

if TYPE_CHECKING:
    from ..data import TokenStream
    from ..report import Report


def write_artifact(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None,
    tolerance: float,
    write_files: Callable[[MoMForCausalLM, Path], Mapping[str, Any]],
    text: TokenStream | None = None,
) -> Report:
    """Write an artifact folder that appears only when it agrees with the model.

    Args:
        model: copied to the CPU in float32; not changed.
        directory: a new folder, or an artifact to replace.
        tokenizer: a ``tokenizer.json`` to put into the folder. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states.
        write_files: (model, folder) -> the target's own entries of the manifest: kind, target, graphs, io, versions,
            ``state_dtype`` where the recurrent state is not float32.
        text: of the kind that the model knows, to verify on as well.

    Raises:
        ValueError: a folder that holds something else, or an artifact that missed its tolerance.
    """
    from .text_verification import HeldOut
    from .verification import record_reference, verify_folder

    folder = Path(directory)
    check_replaceable(folder)
    exact = copy.deepcopy(model).to("cpu", torch.float32).eval()
    with atomic_directory(folder, keep=False) as staging:
        kind = _write_tokenizer(staging, tokenizer, model.config.vocab_size)
        entries = dict(write_files(exact, staging))
        held_out = None if text is None else HeldOut(exact, text)
        record_reference(exact, staging, entries.get("precision", "float32"), held_out)
        dtypes = {"recurrent_state": entries.pop("state_dtype", "float32")}
        versions = {
            **package_versions("mom-compile", "torch"),
            "python": platform.python_version(),
            **entries.pop("versions", {}),
        }
        manifest = {
            "config": exact.config.to_dict(),
            "state": [
                {"name": name, "shape": list(shape[1:]), "dtype": dtypes.get(name, "float32")}
                for name, shape in layer_shapes(exact.config, 1).items()
            ],
            "tokenizer": kind,
            "schemas_sha256": schemas_sha256(),
            "versions": versions,
            "tolerance": tolerance,
            **entries,
        }
        write_manifest(staging, manifest)
        report = verify_folder(staging, exact, tolerance, held_out)
        if not report.passed:
            raise ValueError(
                f"the artifact must agree with the model to {tolerance:g}, got\n{report}\n"
                "nothing was written; raise the tolerance only if these errors are acceptable"
            )
        write_manifest(staging, {**manifest, "parity": report.to_dict()})
    return report


def schemas_sha256() -> str:
    """Hash of the recorded operator schemas, ``ops/schemas.txt``."""
    return hashlib.sha256(resources.files("mom_compile.ops").joinpath("schemas.txt").read_bytes()).hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions by package name."""
    return {name: metadata.version(name) for name in names}


def _write_tokenizer(folder: Path, tokenizer: str | os.PathLike[str] | None, vocab_size: int) -> str:
    if tokenizer is not None:
        source = Path(tokenizer)
        if not source.is_file():
            raise ValueError(f"tokenizer must be a tokenizer.json file, got {str(source)!r}; pass its path")
        shutil.copyfile(source, folder / "tokenizer.json")
        return "tokenizers"
    return "byte" if vocab_size == BYTE_VOCAB_SIZE else "none"
