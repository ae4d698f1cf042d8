"""What every ``launch.py`` shares: one description of a kernel's configuration, used to launch and to list it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._kernel_variant import KernelVariant

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""What the variants cover; float16 compiles as bfloat16 does."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Config:
    """The constexpr arguments and launch options of one kernel."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    overlap: bool | None = None
    """None: the kernel knows nothing of it. True: it waits for the kernel before it by itself (its constant ``PDL``),
    and may be launched before that ends (programmatic dependent launch)."""


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any) -> None:
    """Run ``kernel`` on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    settings = options(config.num_warps, config.num_stages)
    constants = config.constants
    if config.overlap is not None:
        overlap = config.overlap and _overlaps(device)
        settings["launch_pdl"], constants = overlap, {**constants, "PDL": overlap}
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants, **settings)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (CUDA C++ Programming Guide): Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Launch options. Fusing products and sums is said aloud: its default differs between versions of Triton."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def pointer(dtype: torch.dtype) -> str:
    return "*" + _TYPES[dtype]


def variant(
    label: str, kernel: Any, arguments: Mapping[str, str | None], config: Config, quick: bool = False
) -> KernelVariant:
    """``arguments``: name -> Triton type, None for a pointer that is absent."""
    signature = {name: kind for name, kind in arguments.items() if kind is not None}
    absent = {name: None for name, kind in arguments.items() if kind is None}
    constants = {**absent, **config.constants}
    if config.overlap is not None:
        constants["PDL"] = False
    return KernelVariant(label, kernel, signature, constants, config.num_warps, config.num_stages, quick=quick)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def feature_block(features: int, limit: int) -> int:
    """A power of two up to ``limit``: one that divides ``features`` if it is not small, so that no lane idles."""
    even = features & -features
    if even >= 128:
        return min(even, limit)
    return min(next_power_of_2(max(features, 16)), limit)
