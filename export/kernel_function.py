"""One operator of a kernel pack at the sizes of a model, with inputs of any open size to record or run it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MoMConfig
from .launch_formula import Units


class Dtypes(NamedTuple):
    """Of the parameters and activations, and of the convolution's state and the decay's parameters."""

    model: torch.dtype
    kept: torch.dtype


@dataclass(frozen=True)
class Function:
    """An operator at the sizes of one model, with one to three sizes left open.

    Attributes:
        name: a C identifier.
        operator: what it computes, the ``mom::`` name.
        units: names of the open sizes.
        limit: up to which first size the pack has kernels; configurations may depend on it, not on the others.
        run: (units, device) -> makes the operator's launches there, on random inputs.
    """

    name: str
    operator: str
    units: tuple[str, ...]
    limit: int
    run: Callable[[Units, torch.device], Any]


class Inputs:
    """Random tensors on a device."""

    def __init__(self, dtypes: Dtypes, device: torch.device) -> None:
        self.dtypes, self.device = dtypes, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtypes.model, device=self.device)

    def kept(self, *shape: int) -> Tensor:
        return self(*shape, dtype=self.dtypes.kept)

    def wide(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)


def groups(config: MoMConfig) -> int:
    """Key and value projections: one for each memory, or one for all."""
    return 1 if config.single_kv_proj else config.total_memories
