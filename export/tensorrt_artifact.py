"""Writing a TensorRT artifact: graphs that its parser takes, engines built with no GPU, and how to build others."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import MoMConfig
from ..model import MoMForCausalLM
from ._tensorrt import DEFAULT_COMPUTE_CAPABILITIES, check_compute_capabilities, require_tensorrt
from ._tensorrt_provider import provider_options
from .budget import budget
from .jetpack import PROFILES, build_script, check_parser_operators, quantize_weights
from .onnx_artifact import GRAPHS, _graph, check_onnx_packages, save_graphs
from .onnx_runner import FORCED_GRAPH, TOUCHED_GRAPH
from .precision import TOLERANCES
from .tensorrt_engines import build_engine
from .tensorrt_shapes import ShapeRanges, trtexec_shapes
from .writing import package_versions, write_artifact

if TYPE_CHECKING:
    from ..report import Report

_ELSEWHERE = {
    "int8": "TensorRT keeps no weights of 8 bits for products of float16: use --to onnxruntime",
    "int4": "engines of weights of 4 bits are built on a Jetson: use --profile jetpack6",
}
RUNNER_SOURCE = "tensorrt_runner.cpp"
ENGINE_PRECISIONS = ("float32", "float16", "bfloat16")
TOUCHED_FROM = 3
"""From this many memories for each that a token selects, decode moves the selected ones alone."""
# Router, beta and decay: their product stays float32 in every precision.
_FLOAT32_PARAMETERS = ("router.weight", "b_proj", "a_proj", "A_log", "dt_bias")


def to_tensorrt(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    precision: str = "float32",
    compute_capabilities: Sequence[int] | None = None,
    batch: Sequence[int] = (1, 1, 8),
    length: Sequence[int] = (1, 256, 1024),
    profile: str = "rtx",
) -> Report:
    """Export ONNX graphs for TensorRT, build their engines with no GPU, and verify the graphs in onnxruntime.

    The folder holds ``prefill.onnx``, ``decode.onnx`` (all memories, masked) and, where a token selects at most a third
    of the memories, ``decode_touched.onnx``, in the names and shapes of :func:`mom_compile.export.to_onnx`; their
    common ``weights.bin``; for each of prefill and decode one engine for all ``compute_capabilities``; the exact lines
    that build them elsewhere (``build.sh``) and a runner in C++.

    Args:
        model: not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        tokenizer: a ``tokenizer.json`` to put beside the graphs. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of the graphs' logits, in onnxruntime on the CPU. None: 1e-4 for float32;
            with the same routing 2e-2 for float16 and int4, 5e-2 for bfloat16.
        precision: ``float32``, ``float16`` or ``bfloat16`` of weights and activations; for ``jetpack6`` also ``int4``
            weights. Router, decay, inverse, states, logits and the other inputs and outputs are float32.
        compute_capabilities: GPUs that the engines run on, of 80, 86, 89, 120, 121; None: 86, 89 and 120.
        batch, length: smallest, likeliest and largest batch, and tokens of one prefill call.
        profile: ``rtx``, or ``jetpack6`` for a Jetson Orin: no engine, which has to be built on the device.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: an unknown profile, precision or compute capability, a graph that TensorRT does not take, or an
            artifact that missed its tolerance (nothing is left behind).
        ImportError: onnx, onnxscript, onnxruntime or TensorRT for RTX is missing.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}; choose one of them")
    known = ENGINE_PRECISIONS if profile == "rtx" else (*ENGINE_PRECISIONS, "int4")
    if precision not in known:
        raise ValueError(
            f"precision must be one of {', '.join(known)} for profile {profile}, got {precision!r}; "
            f"{_ELSEWHERE.get(precision, 'choose one of them')}"
        )
    if profile == "jetpack6" and compute_capabilities is not None:
        raise ValueError(
            f"compute_capabilities must be None for profile jetpack6, got {tuple(compute_capabilities)}; its "
            "engines are built on the Jetson itself, for 8.7"
        )
    wanted = DEFAULT_COMPUTE_CAPABILITIES if compute_capabilities is None else compute_capabilities
    capabilities = check_compute_capabilities(wanted) if profile == "rtx" else (87,)
    shapes = ShapeRanges(tuple(batch), tuple(length))  # type: ignore[arg-type]
    runtime = check_onnx_packages()
    versions = {**package_versions("onnx", "onnxscript"), "onnxruntime": runtime.__version__}
    if profile == "rtx":
        versions["tensorrt-rtx"] = require_tensorrt().__version__

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        io, files = write_graphs(exact, folder, precision), graph_files(exact.config, precision)
        if profile != "rtx":
            for name in engine_graphs(exact.config):
                check_parser_operators(folder / files[name])
        engines: dict[str, dict[str, Any]] = {
            name: {"file": f"{name}.engine", "shapes": shapes.shapes(io[name]["inputs"])}
            for name in engine_graphs(exact.config)
        }
        for name, engine in engines.items():
            if profile == "rtx":
                graph = folder / files[name]
                engine.update(build_engine(graph, folder / engine["file"], engine["shapes"], capabilities))
        write_deployment_files(folder, engines, profile)
        return {
            "kind": "tensorrt",
            "target": "tensorrt",
            "profile": profile,
            "precision": precision,
            "graphs": files,
            "io": io,
            "engines": engines,
            "compute_capabilities": list(capabilities),
            "ranges": shapes.to_dict(),
            "provider_options": {
                name: provider_options(shapes.shapes(description["inputs"])) for name, description in io.items()
            },
            "budget": budget(exact.config, precision, touched=TOUCHED_GRAPH in engines),
            "versions": versions,
        }

    return write_artifact(
        model, directory, tokenizer, TOLERANCES[precision] if tolerance is None else tolerance, write_files
    )


def graph_files(config: MoMConfig, precision: str) -> dict[str, str]:
    """Graph name -> file; below float32 also the prefill whose routing is given, for the verification."""
    touched = config.total_memories >= TOUCHED_FROM * (config.topk + config.shared_mem)
    names = [TOUCHED_GRAPH] * touched + [FORCED_GRAPH] * (precision != "float32")
    return {**GRAPHS, **{name: f"{name}.onnx" for name in names}}


def engine_graphs(config: MoMConfig) -> tuple[str, ...]:
    """The graphs that become engines: prefill and one form of decode."""
    return ("prefill", TOUCHED_GRAPH if TOUCHED_GRAPH in graph_files(config, "float32") else "decode")


def write_graphs(
    model: MoMForCausalLM, folder: Path, precision: str, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The graphs, or those of ``names``, and their weights; returns their description for the manifest."""
    lower = with_precision(model, precision)

    def make(name: str) -> Any:
        graph = _graph(lower, "tensorrt", name)
        return quantize_weights(graph, precision) if precision == "int4" else graph

    files = graph_files(model.config, precision)
    return save_graphs(folder, ((name, files[name], partial(make, name)) for name in names or files))


def with_precision(model: MoMForCausalLM, precision: str) -> MoMForCausalLM:
    """The model with its weights in another dtype, but for those that feed the router, beta and the decay.

    Weights of 4 bits start from float16.
    """
    if precision == "float32":
        return model
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    kept = {
        name: parameter.detach().float()
        for name, parameter in model.named_parameters()
        if name.endswith(_FLOAT32_PARAMETERS)
    }
    lower = copy.deepcopy(model).to(dtype)
    for name, parameter in lower.named_parameters():
        if name in kept:
            parameter.data = kept[name].clone()
    return lower


def write_deployment_files(folder: Path, engines: dict[str, dict[str, Any]], profile: str) -> None:
    """``build.sh``, which builds the engines where trtexec is, and the runner in C++."""
    lines = {name: (engine["file"], trtexec_shapes(engine["shapes"])) for name, engine in engines.items()}
    (folder / "build.sh").write_text(build_script(lines, profile), encoding="utf-8")
    source = resources.files(__package__ or "").joinpath("cpp", RUNNER_SOURCE).read_text(encoding="utf-8")
    (folder / RUNNER_SOURCE).write_text(source, encoding="utf-8")
