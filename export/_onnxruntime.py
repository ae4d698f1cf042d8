"""onnxruntime: one copy of it, and new enough."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

from .._extras import require

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
MIN_ONNXRUNTIME = (1, 24)
CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_GATED_DELTA_NET = (1, 32)
"""From which version on the CPU's provider has GatedDeltaNet as well, so that a graph of it can be verified."""
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes of a thread block on the smallest GPUs, of compute capability 8.6 and 12.0."""


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
    if runtime_version(runtime) < MIN_ONNXRUNTIME:
        wanted = ".".join(map(str, MIN_ONNXRUNTIME))
        raise ImportError(
            f"onnxruntime must be at least {wanted}, got {runtime.__version__}; "
            f'run: pip install --upgrade "onnxruntime>={wanted}"'
        )
    return runtime


def runtime_version(runtime: ModuleType) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in runtime.__version__.split(".")[:2])


def fit_linear_attention(key_dim: int, value_dim: int) -> None:
    """Have onnxruntime's CUDA provider take the kernel of LinearAttention that fits a head's state.

    Beyond 16 tokens the other one keeps it in shared memory, which fails where that is more than a GPU has. The setting
    is the process's, read when a session is made; a value that is already there stays.
    """
    if 4 * key_dim * value_dim + 2048 > SMALLEST_SHARED_MEMORY:
        os.environ.setdefault("ORT_LINEAR_ATTENTION_COL_SEQ_THRESHOLD", "1000000")


def exact_providers(providers: Sequence[Any], cuda: Mapping[str, str] | None = None) -> list[Any]:
    """Execution providers, CUDA's with these options and float32 products in float32: by default it rounds to TF32."""

    def exact(provider: Any) -> Any:
        name, options = (provider, {}) if isinstance(provider, str) else provider
        if name != CUDA_PROVIDER:
            return provider
        return name, {"use_tf32": "0", **(cuda or {}), **options}

    return [exact(provider) for provider in providers]
