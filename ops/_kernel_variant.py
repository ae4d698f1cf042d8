"""One Triton kernel with one configuration: what a launch uses, and what the ahead-of-time tests compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHARED_MEMORY_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory of one thread block by compute capability, in KiB (CUDA C++ Programming Guide, technical
specifications per compute capability)."""


@dataclass(frozen=True)
class KernelVariant:
    """A kernel as some launch makes it.

    Attributes:
        label: the case in words, such as ``"K=V=64 float32"``.
        kernel: the ``@triton.jit`` function.
        signature: argument name -> Triton type (``"*fp32"``, ``"i32"``, ``"fp32"``), constexpr arguments left out.
        constants: constexpr argument name -> value (an absent pointer is a constant None).
        num_warps, num_stages, registers: launch options; registers: the most of a thread, None without a limit.
        architectures: compute capabilities (times ten) that this configuration serves.
        quick: compiled by every test run; the others by ``make kernels``.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None = None
    architectures: tuple[int, ...] = tuple(SHARED_MEMORY_KB)
    quick: bool = False
