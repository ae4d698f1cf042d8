"""The file of an ONNX artifact's weights, to which its graphs refer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 64


class WeightsFile:
    """Every distinct tensor once, whichever graphs use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}

    def place(self, tensor: Any) -> Any:
        """The tensor as one that lies in the file."""
        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._external(tensor, self._offsets[key], len(data), tensor.shape)

    def rows(self, placed: Any, begin: int, end: int, name: str) -> Any:
        """Rows of a placed matrix as a tensor of their own, in the same bytes."""
        row = placed.nbytes // placed.shape[0]
        shape = [end - begin, *placed.shape[1:]]
        return self._external(placed, placed.offset + begin * row, (end - begin) * row, shape, name)

    def _external(self, tensor: Any, offset: int, length: int, shape: Any, name: str | None = None) -> Any:
        import onnx_ir as ir

        return ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name or tensor.name,
            base_dir=str(self.path.parent),
        )

    def close(self) -> None:
        self._file.close()
