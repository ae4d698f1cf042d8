"""What every ``launch.py`` shares: one description of a kernel's configuration, used to launch and to list it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._kernel_variant import SHARED_MEMORY_KB, KernelVariant

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""What the variants cover; float16 compiles as bfloat16 does."""

OVERLAPS_FROM = 90
"""Compute capability times ten from which on a kernel may start before the one before it ends (programmatic dependent
launch, CUDA C++ Programming Guide)."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


Function = TypeVar("Function", bound=Callable[..., Any])


def remembered(function: Function) -> Function:
    """``function`` of positional arguments, worked out once for each; symbolic sizes have no hash and are not kept."""
    kept = cache(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return kept(*args)
        except TypeError:
            return function(*args)

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class Config:
    """The constexpr arguments and launch options of one kernel."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    overlap: bool | None = None
    """None: the kernel knows nothing of it. True: it waits for the kernel before it by itself (its constant ``PDL``),
    and may be launched before that ends (programmatic dependent launch)."""
    registers: int | None = None
    """Most registers of a thread, where fewer than ptxas would take make room for a thread block more."""

    def all_constants(self, overlap: bool) -> Mapping[str, Any]:
        """The constants and, where the kernel knows of it, whether it overlaps."""
        return self.constants if self.overlap is None else {**self.constants, "PDL": overlap}

    @cached_property
    def number(self) -> int:
        """One for all configurations of equal values, which is cheaper to look up than they are."""
        key = *self.constants.items(), self.num_warps, self.num_stages, self.overlap, self.registers
        return _numbers.setdefault(key, len(_numbers))


_numbers: dict[tuple[Any, ...], int] = {}


def first_device(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor."""
    for x in args:
        if isinstance(x, Tensor):
            return x.device
    raise TypeError("a launch must have a tensor among its arguments, got none")


class Launch(NamedTuple):
    """One launch as a ``launch.py`` makes it; ``args`` are the kernel's first arguments, the constants the others."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    args: tuple[Any, ...]

    def run(self) -> None:
        """Run the kernel on the device of its first tensor; an empty grid runs nothing."""
        if 0 in self.grid:
            return
        device = first_device(self.args)
        # Triton launches on the current device, which need not be that of the tensors.
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                self._run_on(device)
        else:
            self._run_on(device)

    def _run_on(self, device: torch.device) -> None:
        # What Triton compiles for. Its own look-up of a compiled kernel takes longer than many of the kernels run.
        key = device, self.specialization
        known = _compiled.get(key)
        if known is not None:
            compiled, in_order = known
            compiled[(*self.grid, 1, 1)[:3]](*self.args, *in_order)
            return
        keywords = self.keywords(device)
        compiled = self.kernel[self.grid](*self.args, **keywords)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names[len(self.args) :]
            _compiled[key] = compiled, tuple(keywords[name] for name in names)

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """Constants and options for a device. Triton takes another order for another kernel."""
        settings = options(self.config.num_warps, self.config.num_stages, self.config.registers)
        overlap = bool(self.config.overlap) and _overlaps(device)
        if self.config.overlap is not None:
            settings["launch_pdl"] = overlap
        return {**self.config.all_constants(overlap), **settings}

    @property
    def specialization(self) -> tuple[Any, ...]:
        """What one compiled kernel serves: launches of one device with the same are of one kernel.

        Triton may compile anew for the dtype and alignment of a pointer, for 1, multiples of 16 and an integer's width.
        """
        found: list[Any] = [id(self.kernel), self.config.number]
        for x in self.args:
            kind = type(x)
            if kind is Tensor:
                found.append(x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,))
            elif kind is int or kind is bool:
                found.append((x == 1, x % 16 == 0, -(1 << 31) <= x < 1 << 31))
            elif isinstance(x, Tensor):
                found.append(x.dtype if aligned(x) else (x.dtype,))
            else:
                found.append(kind)
        return tuple(found)

    def compile(self, device: torch.device) -> Any:
        """Compile what :meth:`run` launches on ``device``, the current one; tensors may be those of the meta device."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.keywords(device))

    def trace(self) -> None:
        """Make the launch a node of the graph that is being traced; sizes of the grid may be symbols."""
        traced = torch.library.wrap_triton(self.kernel)[self.grid]
        constants, stages = dict(self.config.all_constants(overlap=False)), self.config.num_stages
        if constants.get("FENCE"):
            # Inline assembly hides from the graph which arguments the kernel writes; one stage needs none.
            constants["FENCE"], stages = False, 1
        # Options other than these two have no place in a graph.
        traced(*self.args, **constants, num_warps=self.config.num_warps, num_stages=stages)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Device, kernel, configuration and what Triton specialises on -> compiled kernel and its constants in order."""


_hook: Callable[[Launch], None] | None = None
_architecture: int | torch.device | None = None


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any) -> None:
    """Launch ``kernel``, unless :func:`instead_of_launches` says otherwise."""
    call = Launch(kernel, grid, config, args)
    if _hook is None:
        call.run()
    else:
        _hook(call)


@contextlib.contextmanager
def instead_of_launches(
    hook: Callable[[Launch], None], architecture: int | torch.device | None = None
) -> Iterator[None]:
    """Give every launch to ``hook``, which may run it. With tensors of the meta device nothing needs a GPU.

    Args:
        hook: takes each launch.
        architecture: compute capability times ten of the GPU to configure for, or a device; None: that of the tensors.
    """
    global _hook, _architecture
    before = _hook, _architecture
    _hook, _architecture = hook, architecture
    try:
        yield
    finally:
        _hook, _architecture = before


def launches_run() -> bool:
    """Whether launches are run, and not recorded or traced."""
    return _hook is None


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """A stream behind what was launched so far: its kernels may run beside those that are launched until :func:`join`.
    None where launches do not run on a GPU."""
    if _hook is not None or device.type != "cuda":
        return None
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def join(stream: torch.cuda.Stream | None) -> None:
    """What is launched from now on waits for the stream of :func:`fork`."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def shared_memory_kb(device: torch.device) -> int:
    """Shared memory of a thread block, in KiB; that of the smallest GPUs for the interpreter."""
    if isinstance(_architecture, int):
        return SHARED_MEMORY_KB[_architecture]
    return _device_shared_memory_kb(_architecture or device)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the GPU to configure for: that of :func:`instead_of_launches`, or ``device``."""
    if isinstance(_architecture, int):
        return divmod(_architecture, 10)
    return torch.cuda.get_device_capability(_architecture or device)


def aligned(x: Tensor) -> bool:
    """Whether ``x`` begins at a multiple of 16 bytes, as every allocation does."""
    if isinstance(x, FakeTensor):
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0


@cache
def _device_shared_memory_kb(device: torch.device) -> int:
    if device.type != "cuda":
        return min(SHARED_MEMORY_KB.values())
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin // 1024


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= divmod(OVERLAPS_FROM, 10)


def options(num_warps: int, num_stages: int, registers: int | None = None) -> dict[str, Any]:
    """Launch options. Fusing products and sums is said aloud: its default differs between versions of Triton."""
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **limit}


def pointer(dtype: torch.dtype) -> str:
    return "*" + _TYPES[dtype]


def variant(
    label: str, kernel: Any, arguments: Mapping[str, str | None], config: Config, quick: bool = False
) -> KernelVariant:
    """``arguments``: name -> Triton type, None for a pointer that is absent."""
    signature = {name: kind for name, kind in arguments.items() if kind is not None}
    absent = {name: None for name, kind in arguments.items() if kind is None}
    constants = {**absent, **config.all_constants(overlap=False)}
    return KernelVariant(
        label, kernel, signature, constants, config.num_warps, config.num_stages, config.registers, quick=quick
    )


def overlapped(known: KernelVariant) -> KernelVariant:
    """``known`` as it is launched on a GPU whose kernels may overlap."""
    served = tuple(architecture for architecture in SHARED_MEMORY_KB if architecture >= OVERLAPS_FROM)
    constants = {**known.constants, "PDL": True}
    return replace(known, label=f"{known.label} overlap", constants=constants, architectures=served)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def bits(n: int) -> int:
    """``n.bit_length()``; the most there can be for a symbol."""
    return n.bit_length() if isinstance(n, int) else 31


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def feature_block(features: int, limit: int) -> int:
    """A power of two up to ``limit``: one that divides ``features`` if it is not small, so that no lane idles."""
    even = features & -features
    if even >= 128:
        return min(even, limit)
    return min(next_power_of_2(max(features, 16)), limit)
