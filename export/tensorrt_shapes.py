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


def check_batch(ranges: Mapping[str, Sequence[int]], batch: int, file: str) -> None:
    """Raise unless a batch lies within the shapes that an engine was built for; a length is cut into pieces instead.

    Raises:
        ValueError: names the range, and the option that builds another.
    """
    smallest, likeliest, largest = ranges["batch"]
    if not smallest <= batch <= largest:
        wanted = (min(batch, smallest), likeliest, max(batch, largest))
        raise ValueError(
            f"the batch must lie in [{smallest}, {largest}], the shape profile of {file}, got {batch}; export again "
            f"with --batch {' '.join(map(str, wanted))}, or pass fewer rows at a time"
        )


def trtexec_shapes(shapes: Shapes) -> str:
    """``--minShapes=... --optShapes=... --maxShapes=...`` of trtexec and tensorrt_rtx."""
    options = []
    for which, name in enumerate(RANGES):
        values = ",".join(f"{input_name}:{'x'.join(map(str, shape[which]))}" for input_name, shape in shapes.items())
        options.append(f"--{name}Shapes={values}")
    return " ".join(options)
