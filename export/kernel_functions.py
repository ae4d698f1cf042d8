"""Which functions a kernel pack holds for a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import MoMConfig
from .decode_functions import decode_functions
from .kernel_function import Function
from .prefill_functions import prefill_functions


def functions(config: MoMConfig, dtype: torch.dtype) -> Iterator[Function]:
    """All that decode and prefill launch; what is left are plain matrix products."""
    yield from decode_functions(config, dtype)
    yield from prefill_functions(config, dtype)
