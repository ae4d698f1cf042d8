"""Deployable graphs of a MoM model, their state an explicit input and output.

``load`` of an ONNX artifact needs numpy and onnxruntime alone; writing an artifact needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aoti_artifact import to_aoti as to_aoti
    from .aoti_runner import AotiRunner as AotiRunner
    from .genai_artifact import to_genai as to_genai
    from .kernel_pack import to_kernels as to_kernels
    from .ladder import verify_all as verify_all
    from .onnx_artifact import to_onnx as to_onnx
    from .onnx_cuda_artifact import to_onnx_cuda as to_onnx_cuda
    from .onnx_runner import OnnxRunner as OnnxRunner
    from .pt2_artifact import to_pt2 as to_pt2
    from .runner import Runner as Runner
    from .runner import load as load
    from .tensorrt_artifact import to_tensorrt as to_tensorrt
    from .tensorrt_runner import TensorRTRunner as TensorRTRunner
    from .triton_server_artifact import to_triton_server as to_triton_server
    from .verification import verify as verify

# Lazy: loading an artifact must import neither torch nor triton.
# No module has the name of a function: importing it would put the module in the function's place.
_MODULES = {
    "AotiRunner": "aoti_runner",
    "OnnxRunner": "onnx_runner",
    "Runner": "runner",
    "TensorRTRunner": "tensorrt_runner",
    "load": "runner",
    "to_aoti": "aoti_artifact",
    "to_genai": "genai_artifact",
    "to_kernels": "kernel_pack",
    "to_onnx": "onnx_artifact",
    "to_onnx_cuda": "onnx_cuda_artifact",
    "to_pt2": "pt2_artifact",
    "to_triton_server": "triton_server_artifact",
    "to_tensorrt": "tensorrt_artifact",
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
