"""What the implementations of several operators do to their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def contiguous(*args: Any) -> tuple[Any, ...]:
    """The arguments, tensors among them in contiguous memory."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, of float64 numbers float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums."""
    return x.to(wide(x.dtype))
