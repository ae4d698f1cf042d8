"""The launch table of a kernel pack: what the launches of an operator have in common over its open sizes.

The launches are recorded from the operators' own ``launch.py`` on tensors without memory, at many sizes; grids, shapes
and whole-number arguments are then written as formulas in the sizes, each checked against every recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops._kernel_variant import KernelVariant
from ..ops._launch import OVERLAPS_FROM, Launch, instead_of_launches, pointer
from .kernel_functions import Function
from .launch_formula import Formula, Units, fit

OTHER_SIZES = (1, 2, 3, 17, 63, 65, 129, 4096)
"""Second and third sizes at which a function is recorded."""


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: a pointer to a tensor of ``shape``, or a number with the value that the launch gives.

    Attributes:
        name: as in the kernel.
        type: Triton's, such as ``*bf16``, ``i32`` or ``fp32``.
        shape: of the tensor, None for a number.
        value: of the number, None for a pointer.
    """

    name: str
    type: str
    shape: tuple[Formula, ...] | None = None
    value: Formula | float | None = None


@dataclass(frozen=True)
class Entry:
    """One kernel with one configuration, for a range of its function's first size."""

    name: str
    smallest: int
    largest: int
    variant: KernelVariant
    grid: tuple[Formula, Formula, Formula]
    arguments: tuple[Argument, ...]

    @property
    def overlap(self) -> bool:
        """Whether it may begin before the kernel ahead of it ends, for which it waits by itself."""
        return bool(self.variant.constants.get("PDL"))


def record(function: Function, architecture: int, units: Units) -> list[Launch]:
    """The launches of a function at one size, on tensors of the meta device."""
    launches: list[Launch] = []
    with instead_of_launches(launches.append, architecture), torch.no_grad():
        function.run(units, torch.device("meta"))
    return launches


def entries(function: Function, architecture: int) -> list[Entry]:
    """The table of a function on one architecture, its kernels in the order of their launches."""
    recordings: dict[Units, list[Launch]] = {}

    def at(first: int, second: int = 2, third: int = 2) -> list[Launch]:
        units = (first, second if len(function.units) > 1 else 0, third if len(function.units) > 2 else 0)
        if units not in recordings:
            recordings[units] = record(function, architecture, units)
        return recordings[units]

    found: list[tuple[int, Entry]] = []
    for smallest, largest in _ranges(lambda first: _configuration(at(first)), function.limit):
        inside = [first for first in _samples(largest) if first >= smallest] + [largest]
        for first in inside:
            at(first)
        for other in OTHER_SIZES:
            for first in (*inside[:2], largest):
                at(first, other)
                at(first, 2, other)
            at(inside[0], other, 3 * other)
        chosen = {units: calls for units, calls in recordings.items() if smallest <= units[0] <= largest}
        for position, call in enumerate(at(smallest)):
            calls = {units: launches[position] for units, launches in chosen.items()}
            for another in calls.values():
                assert _configuration([another]) == _configuration([call]), f"{function.name} has no one configuration"
            found.append((position, _entry(function, architecture, smallest, largest, calls)))
    # By launch, not by range: merged entries then still lie in the order of the launches at every size.
    return _merged([entry for _, entry in sorted(found, key=lambda item: item[0])])


def _merged(found: Sequence[Entry]) -> list[Entry]:
    """Entries that differ in their range alone, as one."""
    merged: list[Entry] = []
    for entry in found:
        for i, other in enumerate(merged):
            if other.largest + 1 == entry.smallest and replace(entry, smallest=other.smallest) == replace(
                other, largest=entry.largest
            ):
                merged[i] = replace(other, largest=entry.largest)
                break
        else:
            merged.append(entry)
    return merged


def _samples(limit: int) -> list[int]:
    near = {n + d for power in range(limit.bit_length()) for n in (1 << power,) for d in (-1, 0, 1)}
    return sorted(n for n in near | {5, 6, 7} if 1 <= n <= limit)


def _ranges(key: Callable[[int], Any], limit: int) -> list[tuple[int, int]]:
    """The ranges of 1 .. limit in which ``key`` stays the same, found between samples by bisection."""
    edges = []
    samples = [*_samples(limit), limit]
    for low, high in zip(samples, samples[1:], strict=False):
        while key(low) != key(high) and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if key(middle) == key(low) else (low, middle)
        if key(low) != key(high):
            edges.append(high)
    return list(zip([1, *edges], [edge - 1 for edge in edges] + [limit], strict=True))


def _configuration(calls: Iterable[Launch]) -> list[Any]:
    return [(call.kernel, call.config, [_type(arg) for arg in call.args]) for call in calls]


def _type(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return pointer(value.dtype)
    return "fp32" if isinstance(value, float) else "i32"


def _entry(function: Function, architecture: int, smallest: int, largest: int, calls: Mapping[Units, Launch]) -> Entry:
    call = next(iter(calls.values()))
    names = call.kernel.arg_names[: len(call.args)]
    types = {name: _type(value) for name, value in zip(names, call.args, strict=True)}
    signature = {name: kind for name, kind in types.items() if kind is not None}
    config = call.config
    overlap = bool(config.overlap) and architecture >= OVERLAPS_FROM
    constants = {**{name: None for name, kind in types.items() if kind is None}, **config.all_constants(overlap)}
    kernel = call.kernel.fn.__name__.removesuffix("_kernel")
    label = f"{function.name}.{kernel}"
    variant = KernelVariant(
        label, call.kernel, signature, constants, config.num_warps, config.num_stages, config.registers
    )

    arguments = []
    for position, name in enumerate(names):
        if name not in signature:
            continue
        value = call.args[position]
        if isinstance(value, Tensor):
            shape = tuple(
                fit({units: other.args[position].shape[axis] for units, other in calls.items()})
                for axis in range(value.dim())
            )
            arguments.append(Argument(name, signature[name], shape=shape))
        elif isinstance(value, float):
            assert all(other.args[position] == value for other in calls.values())
            arguments.append(Argument(name, signature[name], value=value))
        else:
            number = fit({units: other.args[position] for units, other in calls.items()})
            arguments.append(Argument(name, signature[name], value=number))
    sizes = {units: (*other.grid, 1, 1)[:3] for units, other in calls.items()}
    x, y, z = (fit({units: grid[axis] for units, grid in sizes.items()}) for axis in range(3))
    return Entry(label, smallest, largest, variant, (x, y, z), tuple(arguments))
