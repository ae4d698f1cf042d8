"""Optional packages, imported late, with an error that names the command to install them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
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


def check_installed(modules: Sequence[str], extra: str) -> None:
    """Raise unless all modules could be imported, without importing them: before long work, not after it.

    Raises:
        ImportError: one is missing; the text names the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f'{module} must be installed for this, got no such package; run: pip install "mom-compile[{extra}]"'
            )
