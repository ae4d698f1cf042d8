"""The TensorRT-RTX execution provider of ONNX Runtime: its shapes as options, and sessions on it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._extras import require
from .tensorrt_shapes import RANGES, Shapes

PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"


def provider_options(shapes: Shapes) -> dict[str, str]:
    """The shape profile of a graph as the provider takes it, and its own CUDA graphs."""
    options = {
        f"nv_profile_{name}_shapes": ",".join(
            f"{key}:{'x'.join(map(str, value[which]))}" for key, value in shapes.items()
        )
        for which, name in enumerate(RANGES)
    }
    return {**options, "enable_cuda_graph": "1"}


def provider_session(runtime: Any, model: str, options: Any, settings: Mapping[str, str]) -> Any:
    """A session whose every node runs on the provider: none is left to the CPU.

    Raises:
        ImportError: the provider's package or the driver it needs is missing.
        ValueError: no GPU that the provider takes.
    """
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        plugin = require("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt-rtx-onnx")
        try:
            runtime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:
            raise ImportError(
                f"{PACKAGE} must load, got {str(error)[:300]}; it needs an NVIDIA driver: install one, or pass "
                'providers=["CPUExecutionProvider"]'
            ) from error
        devices = [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise ValueError(
            f'{PROVIDER} must find an RTX GPU, got none that it takes; pass providers=["CPUExecutionProvider"]'
        )
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], dict(settings))
    return runtime.InferenceSession(model, options)
