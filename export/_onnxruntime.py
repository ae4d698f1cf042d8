"""onnxruntime: one copy of it, and new enough."""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

from .._extras import require

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
MIN_ONNXRUNTIME = (1, 24)


def require_onnxruntime() -> ModuleType:
    """onnxruntime, one copy of it and new enough."""
    found = []
    for package in RUNTIME_PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if len(found) > 1:
        raise ImportError(
            f"one of {' and '.join(RUNTIME_PACKAGES)} must be installed, got {' and '.join(found)}, which overwrite "
            "each other; run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install one of them"
        )
    runtime = require("onnxruntime", "onnx")
    version = tuple(int(part) for part in runtime.__version__.split(".")[:2])
    if version < MIN_ONNXRUNTIME:
        wanted = ".".join(map(str, MIN_ONNXRUNTIME))
        raise ImportError(
            f"onnxruntime must be at least {wanted}, got {runtime.__version__}; "
            f'run: pip install --upgrade "onnxruntime>={wanted}"'
        )
    return runtime
