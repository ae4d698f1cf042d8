"""Mixture-of-Memories (MoM, arXiv 2502.13685) linear attention, compiler first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import export as export
    from . import ops as ops
    from .config import MoMConfig as MoMConfig
    from .decode import DecodeSession as DecodeSession
    from .model import MoMForCausalLM as MoMForCausalLM
    from .model import MoMOutput as MoMOutput
    from .mom_attention import MoMAttention as MoMAttention
    from .state import State as State
    from .state_ops import fork_state as fork_state
    from .state_ops import load_state as load_state
    from .state_ops import save_state as save_state
    from .state_ops import select_rows as select_rows

# Lazy: an exported artifact is run through mom_compile.export without torch, and this file is imported first.
_MODULES = {
    "DecodeSession": "decode",
    "MoMAttention": "mom_attention",
    "MoMConfig": "config",
    "MoMForCausalLM": "model",
    "MoMOutput": "model",
    "State": "state",
    "fork_state": "state_ops",
    "load_state": "state_ops",
    "save_state": "state_ops",
    "select_rows": "state_ops",
}
__all__ = [
    "DecodeSession",
    "MoMAttention",
    "MoMConfig",
    "MoMForCausalLM",
    "MoMOutput",
    "State",
    "export",
    "fork_state",
    "load_state",
    "ops",
    "save_state",
    "select_rows",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in ("ops", "export"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mom_compile' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
