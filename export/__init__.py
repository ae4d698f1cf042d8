"""Deployable graphs of a MoM model, their state an explicit input and output.

``load`` needs numpy and onnxruntime alone; writing an artifact and verifying it need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runner import OnnxRunner as OnnxRunner
    from .runner import load as load
    from .to_onnx import to_onnx as to_onnx
    from .verify import verify as verify

# Lazy: loading an artifact must import neither torch nor triton.
_MODULES = {"OnnxRunner": "runner", "load": "runner", "to_onnx": "to_onnx", "verify": "verify"}
__all__ = ["OnnxRunner", "load", "to_onnx", "verify"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # a function wins over the module of the same name
        return value
    raise AttributeError(f"module 'mom_compile.export' has no attribute {name!r}; it has {', '.join(__all__)}")
