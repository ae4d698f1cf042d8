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
from ..ops._launch import Launch, instead_of_launches, pointer
from .kernel_functions import Function, Units

OTHER_SIZES = (1, 2, 3, 17, 4096)
"""Second sizes at which a function is recorded."""


@dataclass(frozen=True)
class Linear:
    """``base + per_unit[0] * units[0] + per_unit[1] * units[1]``."""

    base: int
    per_unit: Units = (0, 0)

    def __call__(self, units: Units) -> int:
        return self.base + self.per_unit[0] * units[0] + self.per_unit[1] * units[1]

    def text(self, names: Sequence[str]) -> int | str:
        """A number, or a formula in the names of the sizes."""
        parts = [f"{n} * {name}" if n != 1 else name for n, name in zip(self.per_unit, names, strict=False) if n]
        if not parts:
            return self.base
        return " + ".join([*parts, str(self.base)] if self.base else parts)


@dataclass(frozen=True)
class Axis:
    """Programs along one axis of a grid: ``times * ceil(units[unit] / per)``, or ``times`` where per is 0."""

    times: int
    per: int = 0
    unit: int = 0

    def __call__(self, units: Units) -> int:
        return self.times * (-(-units[self.unit] // self.per) if self.per else 1)

    def text(self, names: Sequence[str]) -> int | str:
        """A number, or a formula in the names of the sizes."""
        if not self.per:
            return self.times
        blocks = names[self.unit] if self.per == 1 else f"ceil({names[self.unit]} / {self.per})"
        return blocks if self.times == 1 else f"{self.times} * {blocks}"


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
    shape: tuple[Linear, ...] | None = None
    value: Linear | float | None = None


@dataclass(frozen=True)
class Entry:
    """One kernel with one configuration, for a range of its function's first size."""

    name: str
    smallest: int
    largest: int
    variant: KernelVariant
    grid: tuple[Axis, Axis, Axis]
    arguments: tuple[Argument, ...]


def record(function: Function, architecture: int, units: Units) -> list[Launch]:
    """The launches of a function at one size, on tensors of the meta device."""
    launches: list[Launch] = []
    with instead_of_launches(launches.append, architecture), torch.no_grad():
        function.run(units, torch.device("meta"))
    return launches


def entries(function: Function, architecture: int) -> list[Entry]:
    """The table of a function on one architecture, its kernels in the order of their launches."""
    recordings: dict[Units, list[Launch]] = {}

    def at(first: int, second: int = 2) -> list[Launch]:
        units = (first, second if len(function.units) > 1 else 0)
        if units not in recordings:
            recordings[units] = record(function, architecture, units)
        return recordings[units]

    found: list[tuple[int, Entry]] = []
    for smallest, largest in _ranges(lambda first: _configuration(at(first)), function.limit):
        inside = [first for first in _samples(largest) if first >= smallest] + [largest]
        for first in inside:
            at(first)
        for second in OTHER_SIZES if len(function.units) > 1 else ():
            for first in (*inside[:4], largest):
                at(first, second)
        chosen = {units: calls for units, calls in recordings.items() if smallest <= units[0] <= largest}
        for position, call in enumerate(at(smallest)):
            calls = {units: launches[position] for units, launches in chosen.items()}
            for other in calls.values():
                assert _configuration([other]) == _configuration([call]), f"{function.name} has no one configuration"
            found.append((position, _entry(function, smallest, largest, calls)))
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


def _entry(function: Function, smallest: int, largest: int, calls: Mapping[Units, Launch]) -> Entry:
    call = next(iter(calls.values()))
    names = call.kernel.arg_names[: len(call.args)]
    types = {name: _type(value) for name, value in zip(names, call.args, strict=True)}
    signature = {name: kind for name, kind in types.items() if kind is not None}
    constants = {**{name: None for name, kind in types.items() if kind is None}, **call.config.constants}
    kernel = call.kernel.fn.__name__.removesuffix("_kernel")
    label = f"{function.name}.{kernel}"
    config = call.config
    variant = KernelVariant(label, call.kernel, signature, constants, config.num_warps, config.num_stages)

    arguments = []
    for position, name in enumerate(names):
        if name not in signature:
            continue
        value = call.args[position]
        if isinstance(value, Tensor):
            shape = tuple(
                _linear({units: other.args[position].shape[axis] for units, other in calls.items()})
                for axis in range(value.dim())
            )
            arguments.append(Argument(name, signature[name], shape=shape))
        elif isinstance(value, float):
            assert all(other.args[position] == value for other in calls.values())
            arguments.append(Argument(name, signature[name], value=value))
        else:
            number = _linear({units: other.args[position] for units, other in calls.items()})
            arguments.append(Argument(name, signature[name], value=number))
    sizes = {units: (*other.grid, 1, 1)[:3] for units, other in calls.items()}
    x, y, z = (_axis({units: grid[axis] for units, grid in sizes.items()}) for axis in range(3))
    return Entry(label, smallest, largest, variant, (x, y, z), tuple(arguments))


def _linear(values: Mapping[Units, int]) -> Linear:
    slopes = [0, 0]
    for unit in range(2):
        for a in values:
            for b in values:
                if a[unit] != b[unit] and a[1 - unit] == b[1 - unit]:
                    slopes[unit] = (values[b] - values[a]) // (b[unit] - a[unit])
                    break
            else:
                continue
            break
    first = next(iter(values))
    base = values[first] - slopes[0] * first[0] - slopes[1] * first[1]
    formula = Linear(base, (slopes[0], slopes[1]))
    assert all(formula(units) == value for units, value in values.items()), f"no linear formula for {values}"
    return formula


def _axis(values: Mapping[Units, int]) -> Axis:
    """The formula with the largest block: for a range of one size a constant."""
    candidates = [Axis(value) for value in set(values.values())][:1]
    for unit in range(2):
        for power in range(14):
            first = next(iter(values))
            blocks = -(-first[unit] // (1 << power))
            if blocks and values[first] % blocks == 0:
                candidates.append(Axis(values[first] // blocks, 1 << power, unit))
    for formula in candidates:
        if all(formula(units) == value for units, value in values.items()):
            return formula
    raise AssertionError(f"no grid formula for {values}")
