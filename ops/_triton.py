"""Which tensors the Triton kernels serve."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

# Triton reads the variable when a kernel is decorated, so it is read once here as well.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(args: Sequence[Any]) -> bool:
    """True where the first tensor among ``args`` lies on a CUDA device, or anywhere under ``TRITON_INTERPRET=1``.

    float64 always takes the PyTorch implementation: it exists for verification.
    """
    import torch

    for value in args:
        if isinstance(value, Tensor):
            if any(isinstance(other, Tensor) and other.dtype == torch.float64 for other in args):
                return False
            return INTERPRET or value.is_cuda
    return False


_standing_for_gpu = False


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` lies on a GPU, or stands for a tensor that does (:func:`standing_for_gpu`)."""
    return x.is_cuda or _standing_for_gpu


@contextlib.contextmanager
def standing_for_gpu() -> Iterator[None]:
    """Inside, operators take every tensor for one on a GPU: they save what they do there, and check no values."""
    global _standing_for_gpu
    before, _standing_for_gpu = _standing_for_gpu, True
    try:
        yield
    finally:
        _standing_for_gpu = before


class LazyLaunch:
    """``<package>.launch``, imported at its first use: importing the operators must not need triton."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{self._package}.launch"), name)
