"""Mixture-of-Memories (MoM, arXiv 2502.13685) linear attention, compiler first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import export as export
    from . import ops as ops
    from .config import MoMConfig as MoMConfig
    from .model import MoMForCausalLM as MoMForCausalLM
    from .model import MoMOutput as MoMOutput
    from .mom_attention import MoMAttention as MoMAttention
    from .state import State as State

# Lazy: an exported artifact is run through mom_compile.export without torch, and this file is imported first.
_MODULES = {
    "MoMAttention": "mom_attention",
    "MoMConfig": "config",
    "MoMForCausalLM": "model",
    "MoMOutput": "model",
    "State": "state",
}
__all__ = ["MoMAttention", "MoMConfig", "MoMForCausalLM", "MoMOutput", "State", "export", "ops"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in ("ops", "export"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mom_compile' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
