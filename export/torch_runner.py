"""What the runners share whose logits and states are tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .runner import Runner, Step

WEIGHTS_FILE = "weights.safetensors"


class TorchRunner(Runner):
    """A runner whose states are tensors on one device."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str | torch.device) -> None:
        super().__init__(folder, manifest)
        self.device = torch.device(device)

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def _value(self, value: Any) -> torch.Tensor:
        if str(getattr(value, "dtype", "")) == "bfloat16":  # numpy's, of ml_dtypes, which torch cannot read
            value = value.astype(np.float32)
        return torch.as_tensor(value, device=self.device)

    def _convert(self, value: torch.Tensor, dtype: str) -> torch.Tensor:
        return value.to(getattr(torch, dtype))

    def _check_ids(self, input_ids: Any) -> NDArray[np.int64]:
        return super()._check_ids(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids)

    def decode_loop(self, state: Sequence[Mapping[str, Any]], batch_size: int, **options: Any) -> Step:
        """As :meth:`Runner.decode_loop`."""
        current = self._check_state(batch_size, state)

        def step(tokens: NDArray[Any]) -> NDArray[np.float32]:
            nonlocal current
            ids = np.ascontiguousarray(tokens, np.int64).reshape(batch_size, 1)
            logits, current = self._run(ids, current)
            return np.asarray(logits[:, 0].cpu())

        return step
