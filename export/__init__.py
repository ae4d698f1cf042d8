"""Deployable graphs of a MoM model, their state an explicit input and output.

``load`` of an ONNX artifact needs numpy and onnxruntime alone; writing an artifact needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .genai_artifact import to_genai as to_genai
    from .ladder import verify_all as verify_all
    from .onnx_artifact import to_onnx as to_onnx
    from .onnx_runner import OnnxRunner as OnnxRunner
    from .pt2_artifact import to_pt2 as to_pt2
    from .runner import Runner as Runner
    from .runner import load as load
    from .verification import verify as verify

# Lazy: loading an artifact must import neither torch nor triton.
# No module has the name of a function: importing it would put the module in the function's place.
_MODULES = {
    "OnnxRunner": "onnx_runner",
    "Runner": "runner",
    "load": "runner",
    "to_genai": "genai_artifact",
    "to_onnx": "onnx_artifact",
    "to_pt2": "pt2_artifact",
    "verify": "verification",
    "verify_all": "ladder",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mom_compile.export' has no attribute {name!r}; it has {', '.join(__all__)}")
