"""Registered operators inside Torch-TensorRT engines, as ahead-of-time quick-deploy plugins of their Triton kernels.

Such a plugin is one kernel that takes its inputs, whole numbers and outputs, so it serves the operators that are one
functional launch: routing and the gated norm. The decode step (two launches, in place) has ``mom_plugin.cpp`` of the
kernel pack instead. Untested until someone runs ``pytest -m torch_tensorrt`` where torch-tensorrt, TensorRT 10.8 or
later and a GPU are.
"""

from __future__ import annotations

from typing import Any

import torch

from .._extras import require
from ..ops._aot import Binary, compile_variant
from ..ops._kernel_variant import KernelVariant
from ..ops._launch import Config
from ..ops.gated_rms_norm import launch as gated_rms_norm
from ..ops.route import launch as route

PLUGINS = ("mom::gated_rms_norm", "mom::route")


def gated_rms_norm_variant(features: int, eps: float, dtype: str) -> KernelVariant:
    """The kernel of ``mom::gated_rms_norm`` for rows of ``features`` values of a Triton type such as ``bf16``."""
    from .torch_tensorrt_kernels import gated_rms_norm_plugin_kernel

    types = dict.fromkeys(("x", "gate", "weight", "y"), "*" + dtype) | {"rows": "i32"}
    config = gated_rms_norm._config(features)
    return _variant(gated_rms_norm_plugin_kernel, types, config, {"EPS": eps})


def route_variant(memories: int, topk: int) -> KernelVariant:
    """The kernel of ``mom::route``."""
    from .torch_tensorrt_kernels import route_plugin_kernel

    types = {"logits": "*fp32", "tokens": "i32", "weights": "*fp32", "indices": "*i64"}
    return _variant(route_plugin_kernel, types, route._config(memories, topk, False), {})


def _variant(kernel: Any, types: dict[str, str], config: Config, constants: dict[str, Any]) -> KernelVariant:
    merged = {**config.constants, **constants}
    return KernelVariant(
        kernel.fn.__name__, kernel, types, merged, config.num_warps, config.num_stages, config.registers
    )


def register_plugins() -> tuple[str, ...]:
    """Register plugins and converters with TensorRT and Torch-TensorRT, for the current GPU.

    Afterwards ``torch_tensorrt.dynamo.compile`` keeps these operators inside its engines.

    Returns:
        The names of the operators.

    Raises:
        ImportError: torch-tensorrt, or a TensorRT with quick-deploy plugins, is missing.
    """
    trt = require("tensorrt", "torch-tensorrt")
    plugin: Any = require("tensorrt.plugin", "torch-tensorrt")
    converters: Any = require("torch_tensorrt.dynamo.conversion.plugins", "torch-tensorrt")
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    tensor = plugin.TensorDesc
    one, two = (tuple.__class_getitem__((tensor,) * n) for n in (1, 2))
    types = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}

    def launch(variant: KernelVariant, programs: Any, size: Any) -> tuple[Any, ...]:
        binary: Binary = compile_variant(variant, architecture)
        parameters = plugin.KernelLaunchParams()
        parameters.grid_x, parameters.block_x, parameters.shared_mem = programs, 32 * variant.num_warps, binary.shared
        extra = plugin.SymIntExprs(1)
        extra[0] = plugin.SymInt32(size)
        return binary.symbol, binary.ptx, parameters, extra

    # TensorRT reads the annotations of these functions, which must be types and not their names.
    def norm_description(x, gate, weight, eps):  # type: ignore[no-untyped-def]
        return x.like()

    def norm_launch(x, gate, weight, eps, outputs, tactic):  # type: ignore[no-untyped-def]
        features = x.shape_expr[x.ndim - 1].constant_value()
        rows = x.shape_expr.numel() // features
        variant = gated_rms_norm_variant(features, eps, types[x.dtype])
        return launch(variant, plugin.cdiv(rows, variant.constants["BLOCK_R"]), rows)

    def route_description(logits, topk):  # type: ignore[no-untyped-def]
        shape = (logits.shape_expr[0], topk)
        return plugin.from_shape_expr(shape, trt.float32), plugin.from_shape_expr(shape, trt.int64)

    def route_launch(logits, topk, outputs, tactic):  # type: ignore[no-untyped-def]
        tokens = logits.shape_expr[0]
        variant = route_variant(logits.shape_expr[1].constant_value(), topk)
        return launch(variant, plugin.cdiv(tokens, variant.constants["BLOCK_T"]), tokens)

    result = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymExprs]
    norm_inputs = {"x": tensor, "gate": tensor, "weight": tensor, "eps": float}
    route_inputs = {"logits": tensor, "topk": int}
    implementation = {"outputs": one, "tactic": int, "return": result}
    norm_description.__annotations__ = norm_inputs | {"return": tensor}
    norm_launch.__annotations__ = norm_inputs | implementation
    route_description.__annotations__ = route_inputs | {"return": two}
    route_launch.__annotations__ = route_inputs | implementation | {"outputs": two}
    functions = ((norm_description, norm_launch), (route_description, route_launch))
    for name, (description, implementation_of) in zip(PLUGINS, functions, strict=True):
        plugin.register(name)(description)
        plugin.aot_impl(name)(implementation_of)
        converters.generate_plugin_converter(name, supports_dynamic_shapes=True, use_aot_if_available=True)
    return PLUGINS
