"""Which functions a kernel pack holds for a model."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import MoMConfig
from .decode_functions import decode_functions
from .kernel_function import Dtypes, Function
from .prefill_functions import prefill_functions


def functions(config: MoMConfig, dtypes: Dtypes) -> Iterator[Function]:
    """All that decode and prefill launch; what is left are plain matrix products."""
    yield from decode_functions(config, dtypes)
    yield from prefill_functions(config, dtypes)
