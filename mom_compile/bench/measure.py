"""Times, and the ceilings of this machine in this run: copying, reading, multiplying."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

# Dense bfloat16 matrix products with float32 accumulation, FLOP/s, from the vendor's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}
PAUSE = 0.3  # seconds in which the threads of another runtime stop waiting for work, which they do by spinning
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def median_ms(
    function: Callable[[], object],
    device: torch.device,
    repeats: int = 20,
    inner: int = 1,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of a call in ms: CUDA events on a GPU, the clock elsewhere.

    Args:
        function: what is timed.
        device: where it runs.
        repeats: measurements the median is over.
        inner: calls in one measurement, whose mean counts.
        warm_up: calls before the first measurement.
        clock: seconds.
    """
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(inner):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / inner)
        else:
            begin = clock()
            for _ in range(inner):
                function()
            times.append((clock() - begin) * 1e3 / inner)
    return median(times)


def interleaved_ms(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    repeats: int = 20,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """:func:`median_ms` of several functions in turns, so that what others do on the machine falls on all alike.

    Args:
        functions: what is timed.
        device: where it runs.
        repeats: measurements a median is over.
        rounds: turns that they are spread over.
        clock: seconds.
    """
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            time.sleep(PAUSE)
            function()
            taken += [median_ms(function, device, 1, warm_up=0, clock=clock) for _ in range(-(-repeats // rounds))]
    return [median(taken) for taken in times]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written ones counted."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_ms(lambda: target.copy_(source), device) * 1e3


def reads(device: torch.device) -> tuple[int, list[Callable[[], object]]]:
    """Bytes of a large float32 buffer and functions that read it once: a sum and a product with a vector."""
    matrix = torch.ones(COPY_BYTES[device.type] // 2**14, 2**12, device=device)
    vector = torch.ones(2**12, device=device)
    return matrix.numel() * matrix.element_size(), [matrix.sum, lambda: matrix @ vector]


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of torch on random values."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, device, inner=5 if device.type == "cuda" else 1) * 1e3


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 FLOP/s of a GPU, None where this file does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> str:
    """Versions that a figure depends on."""
    parts = [f"torch {torch.__version__}"]
    try:
        import triton

        parts.append(f"triton {triton.__version__}")
    except ImportError:
        pass
    return ", ".join([*parts, f"python {platform.python_version()}"])


def seconds_since_start() -> float | None:
    """Seconds since this process started, imports included; None where the system does not tell (not Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give cached memory back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
