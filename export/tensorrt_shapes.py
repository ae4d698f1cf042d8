"""The shapes an engine serves: smallest, likeliest and largest of every input. Needs no torch and no TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANGES = ("min", "opt", "max")
Shapes = dict[str, list[list[int]]]
"""Input -> its smallest, likeliest and largest shape."""


@dataclass(frozen=True)
class ShapeRanges:
    """(smallest, likeliest, largest) batch, and tokens of one prefill call; longer prompts go through in pieces."""

    batch: tuple[int, int, int] = (1, 1, 8)
    length: tuple[int, int, int] = (1, 256, 1024)

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            values = getattr(self, name)
            if len(values) != 3 or values[0] < 1 or sorted(values) != list(values):
                raise ValueError(
                    f"{name} must be three ascending numbers of at least 1 (smallest, likeliest, largest), "
                    f"got {tuple(values)}; (1, 1, 8) is usual for a batch"
                )

    def shapes(self, inputs: Sequence[Mapping[str, Any]]) -> Shapes:
        """For the inputs of a graph, as its description in the manifest has them."""
        sizes = {"batch": self.batch, "sequence": self.length}
        return {
            value["name"]: [
                [sizes[size][which] if isinstance(size, str) else size for size in value["shape"]] for which in range(3)
            ]
            for value in inputs
        }

    def to_dict(self) -> dict[str, list[int]]:
        """Plain values for the manifest."""
        return {"batch": list(self.batch), "length": list(self.length)}


def check_fits(ranges: Mapping[str, Sequence[int]], batch: int, length: int, file: str) -> None:
    """Raise unless a batch of ``length`` tokens lies within the ranges that an engine was built for.

    Raises:
        ValueError: names what is outside, and the option to build it in.
    """
    for name, value in (("batch", batch), ("length", length)):
        smallest, _, largest = ranges[name]
        if not smallest <= value <= largest:
            raise ValueError(
                f"{name} must lie in [{smallest}, {largest}], the shape profile of {file}, got {value}; export again with "
                f"{name}=({smallest}, ..., {max(value, largest)}), or pass less at a time"
            )


def trtexec_shapes(shapes: Shapes) -> str:
    """``--minShapes=... --optShapes=... --maxShapes=...`` of trtexec and tensorrt_rtx."""
    options = []
    for which, name in enumerate(RANGES):
        values = ",".join(f"{input_name}:{'x'.join(map(str, shape[which]))}" for input_name, shape in shapes.items())
        options.append(f"--{name}Shapes={values}")
    return " ".join(options)
