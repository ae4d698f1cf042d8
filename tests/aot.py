"""Which kernel configurations ship."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import mom_compile.ops as ops
from mom_compile.ops._kernel_variant import KernelVariant


def collect() -> list[KernelVariant]:
    """The variants of every operator package whose launch module lists them."""
    found: list[KernelVariant] = []
    for package in pkgutil.iter_modules(ops.__path__):
        if package.ispkg and (Path(next(iter(ops.__path__))) / package.name / "launch.py").exists():
            launch = importlib.import_module(f"{ops.__name__}.{package.name}.launch")
            found.extend(getattr(launch, "variants", tuple)())
    return found


def name_of(variant: KernelVariant) -> str:
    package = variant.kernel.fn.__module__.split(".")[-2]
    return f"{package}.{variant.kernel.fn.__name__} {variant.label}"
