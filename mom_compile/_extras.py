"""Optional packages, imported late, with an error that names the command to install them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: its import name, such as ``matplotlib.pyplot``.
        extra: the extra of this package that brings it.

    Raises:
        ImportError: it is missing; the text names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} must be installed for this, got {error}; run: pip install "mom-compile[{extra}]"'
        ) from error
