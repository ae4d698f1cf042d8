"""Engines from ONNX files, ahead of time and with no GPU, by TensorRT for RTX."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._tensorrt import check_compute_capabilities, require_tensorrt
from .tensorrt_shapes import Shapes


def build_engine(onnx_file: Path, engine_file: Path, shapes: Shapes, capabilities: Sequence[int]) -> dict[str, Any]:
    """Build one engine that runs on every given compute capability.

    Strongly typed: the graph's own dtypes are the engine's. Its float32 products are exact ones, not TF32, which would
    round the cumulative decay and the router.

    Args:
        onnx_file: the graph; its weights lie beside it.
        engine_file: to write.
        shapes: smallest, likeliest and largest shape of every input.
        capabilities: such as ``(86, 89, 120)``.

    Returns:
        ``build_seconds`` and ``bytes``.

    Raises:
        ValueError: an unknown compute capability, or a graph that TensorRT does not take; the text holds its reasons.
        ImportError: TensorRT for RTX is missing.
    """
    capabilities = check_compute_capabilities(capabilities)
    tensorrt = require_tensorrt()
    start = time.perf_counter()
    log = _log(tensorrt)
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        errors = "; ".join(_parser_error(parser.get_error(index)) for index in range(parser.num_errors))
        raise ValueError(
            f"{onnx_file.name} must parse in TensorRT for RTX {tensorrt.__version__}, got {errors[:800]}; "
            "it holds an operator that TensorRT lacks: export it with --to tensorrt"
        )
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, f"SM{capability}"), index)
    profile = builder.create_optimization_profile()
    for name, (smallest, likeliest, largest) in shapes.items():
        profile.set_shape(name, smallest, likeliest, largest)
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"shapes must be a profile of {onnx_file.name}, got {shapes}; name every input")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        targets = ", ".join(map(str, capabilities))
        raise ValueError(
            f"{onnx_file.name} must build in TensorRT for RTX {tensorrt.__version__} for {targets}, got "
            f"{'; '.join(log.errors)[:800]}; build for other compute capabilities or with another precision"
        )
    with engine_file.open("wb") as file:
        file.write(memoryview(engine))
    return {"build_seconds": round(time.perf_counter() - start, 2), "bytes": engine_file.stat().st_size}


def _parser_error(error: Any) -> str:
    return f"{error.node_operator() or 'node'} {error.node_name()}: {error.desc()}"


def _log(tensorrt: Any) -> Any:
    """A logger that keeps the errors for our own message and says nothing itself."""

    class Log(tensorrt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.ERROR:
                self.errors.append(message)

    return Log()
