"""Deployable graphs of a MoM model, their state an explicit input and output.

``load`` needs numpy and onnxruntime alone; writing an artifact and verifying it need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx_artifact import to_onnx as to_onnx
    from .runner import OnnxRunner as OnnxRunner
    from .runner import load as load
    from .verification import verify as verify

# Lazy: loading an artifact must import neither torch nor triton.
# No module has the name of a function: importing it would put the module in the function's place.
_MODULES = {
    "OnnxRunner": "runner",
    "load": "runner",
    "to_onnx": "onnx_artifact",
    "verify": "verification",
}
__all__ = ["OnnxRunner", "load", "to_onnx", "verify"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mom_compile.export' has no attribute {name!r}; it has {', '.join(__all__)}")
