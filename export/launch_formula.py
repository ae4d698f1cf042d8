"""Whole numbers of a kernel launch as formulas in the open sizes of a function, found from values at many sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Units = tuple[int, int, int]
"""The open sizes of a function; those that it does not have are 0."""
MOST_BLOCK = 14
MOST_FACTOR = 512


@dataclass(frozen=True)
class Formula:
    """``base + sum(per_unit[i] * units[i]) + times * ceil(each * units[unit] / per)``, or its number of binary digits.

    Attributes:
        base: constant.
        per_unit: factor of each size.
        times, each, per, unit: blocks of ``per``, of which every one of a size has ``each``; none where ``per`` is 0.
        digits: count the binary digits of the sum.
    """

    base: int
    per_unit: Units = (0, 0, 0)
    times: int = 0
    each: int = 1
    per: int = 0
    unit: int = 0
    digits: bool = False

    def __call__(self, units: Units) -> int:
        value = self.base + sum(a * b for a, b in zip(self.per_unit, units, strict=True))
        if self.per:
            value += self.times * -(-self.each * units[self.unit] // self.per)
        return value.bit_length() if self.digits else value

    def __mul__(self, factor: int) -> Formula:
        assert not self.digits
        first, second, third = self.per_unit
        per_unit = (factor * first, factor * second, factor * third)
        return replace(self, base=factor * self.base, per_unit=per_unit, times=factor * self.times)

    @property
    def constant(self) -> bool:
        return self.per_unit == (0, 0, 0) and not self.per

    def text(self, names: Sequence[str]) -> int | str:
        """A number, or a formula in the names of the sizes."""
        if self.constant:
            return self(self.per_unit)
        terms = [(n, name) for n, name in zip(self.per_unit, names, strict=False) if n]
        if self.per:
            size = names[self.unit] if self.each == 1 else f"{self.each} * {names[self.unit]}"
            terms.append((self.times, f"ceil({size} / {self.per})"))
        parts = [f"{n} * {name}" if n != 1 else name for n, name in terms]
        total = " + ".join([*parts, str(self.base)] if self.base else parts)
        return f"digits({total})" if self.digits else total


def fit(values: Mapping[Units, int]) -> Formula:
    """The simplest formula that gives every value: linear, blocks of a power of two, or digits.

    Raises:
        AssertionError: there is none.
    """
    candidates: list[Formula | None] = [_linear(values)]
    powers = [(unit, 1 << power) for power in range(1, MOST_BLOCK) for unit in range(3)]
    candidates += [_blocks(values, unit, per) for unit, per in powers]
    candidates += [_parts(values, unit, per) for unit, per in powers]
    for formula in candidates:
        if formula is not None and all(formula(units) == value for units, value in values.items()):
            return formula
    for unit in range(3):
        for factor in range(1, MOST_FACTOR):
            if all((factor * units[unit]).bit_length() == value for units, value in values.items()):
                first, second, third = (factor * (unit == i) for i in range(3))
                return Formula(0, (first, second, third), digits=True)
    raise AssertionError(f"no formula for {values}")


def _linear(values: Mapping[Units, int]) -> Formula:
    slopes = [0, 0, 0]
    for unit in range(3):
        seen: dict[tuple[int, ...], Units] = {}
        for units in values:
            rest = (*units[:unit], *units[unit + 1 :])
            other = seen.setdefault(rest, units)
            if other != units:
                slopes[unit] = (values[units] - values[other]) // (units[unit] - other[unit])
                break
    first = next(iter(values))
    base = values[first] - sum(slope * size for slope, size in zip(slopes, first, strict=True))
    return Formula(base, (slopes[0], slopes[1], slopes[2]))


def _blocks(values: Mapping[Units, int], unit: int, per: int) -> Formula | None:
    first = next(iter(values))
    blocks = {units: -(-units[unit] // per) for units in values}
    other = next((units for units in values if blocks[units] != blocks[first]), None)
    if other is None:
        return None
    times = (values[other] - values[first]) // (blocks[other] - blocks[first])
    return Formula(values[first] - times * blocks[first], times=times, per=per, unit=unit)


def _parts(values: Mapping[Units, int], unit: int, per: int) -> Formula | None:
    """Blocks of a size of which every one has several, in a ratio that the largest value shows."""
    largest = max(values, key=lambda units: units[unit])
    each = round(values[largest] * per / max(largest[unit], 1))
    return Formula(0, times=1, each=each, per=per, unit=unit) if each else None
