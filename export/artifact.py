"""The artifact folder: its manifest, and the checks that a folder is whole and unchanged. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .._files import read_json, write_json

MANIFEST_FILE = "manifest.json"
FORMAT = "mom-compile artifact"
FORMAT_VERSION = 1
STATE_LAYOUT_VERSION = 1


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _body_hash(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json: the given entries, every file's size and hash, and a hash of the manifest itself."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state_layout_version": STATE_LAYOUT_VERSION,
        **manifest,
        "files": files,
    }
    manifest["manifest_sha256"] = _body_hash(manifest)
    write_json(folder / MANIFEST_FILE, manifest)


def update_manifest(folder: Path, **entries: Any) -> None:
    """Put entries into the manifest of a folder whose files stay as they are."""
    manifest = {**read_json(folder / MANIFEST_FILE), **entries}
    manifest["manifest_sha256"] = _body_hash(manifest)
    staging = folder / f".{MANIFEST_FILE}.new"
    write_json(staging, manifest)
    os.replace(staging, folder / MANIFEST_FILE)


def is_artifact(directory: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a manifest."""
    return (Path(directory) / MANIFEST_FILE).is_file()


def check_replaceable(folder: Path) -> None:
    """Raise ValueError if the folder holds something else than an artifact."""
    if folder.is_dir() and any(folder.iterdir()) and not is_artifact(folder):
        raise ValueError(f"directory must be new, empty or an artifact, got {str(folder)!r} with other files in it")


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder that is whole and unchanged.

    Raises:
        ValueError: no artifact, another format or state layout, a file that is missing or changed, an edited manifest.
    """
    folder = Path(directory)
    if not is_artifact(folder):
        raise ValueError(f"directory must hold {MANIFEST_FILE}, got {str(folder)!r} without one; export writes it")
    manifest = read_json(folder / MANIFEST_FILE)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST_FILE} must be that of a {FORMAT}, got another file; export again")
    for key, known in (("format_version", FORMAT_VERSION), ("state_layout_version", STATE_LAYOUT_VERSION)):
        if manifest.get(key) != known:
            raise ValueError(
                f"{key} must be {known}, got {manifest.get(key)}; export the checkpoint again with this version"
            )
    if manifest.get("manifest_sha256") != _body_hash(manifest):
        raise ValueError(
            f"{folder / MANIFEST_FILE} must be as export wrote it, got one that was edited; export the checkpoint again"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} must lie in {folder}, got no such file; copy the whole folder, or export again")
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise ValueError(f"{name} must have the hash in {MANIFEST_FILE}, got another; it is damaged: export again")
    return manifest
