"""Writing an ONNX artifact for ONNX Runtime on CUDA whose nodes are the model's own Triton kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model import MoMForCausalLM
from .kernel_function import Dtypes
from .kernel_graphs import check_alignment, write_graphs
from .kernel_pack import SOURCES, check_compute_capabilities, write_pack
from .onnx_artifact import GRAPHS, check_onnx_packages
from .onnx_runner import FORCED_GRAPH, KERNELS_FOLDER
from .operator_library import CUDA_OPERATORS
from .precision import TOLERANCES
from .writing import package_versions, write_artifact

if TYPE_CHECKING:
    from ..data import TokenStream
    from ..report import Report

PRECISIONS = ("float16", "bfloat16", "float32")
TARGET = "onnxruntime-cuda"
DEFAULT_COMPUTE_CAPABILITIES = (80, 86, 89, 90, 120)


def to_onnx_cuda(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    precision: str = "float16",
    compute_capabilities: Sequence[int] = DEFAULT_COMPUTE_CAPABILITIES,
    text: TokenStream | None = None,
) -> Report:
    """Export for ONNX Runtime's CUDA provider, with the kernels that PyTorch runs.

    The folder holds ``prefill.onnx`` (any batch and length), ``decode.onnx`` (one token), their common ``weights.bin``
    and ``kernels/``: the kernels as cubin and PTX, and the sources of a library that makes them operators of the
    runtime (domain ``mom``). The library, ``kernels/libmom_onnx_<machine>.so``, is built here where g++ and ONNX
    Runtime's headers are found (``ONNXRUNTIME_INCLUDE``); elsewhere the first lines of ``mom_onnx.cpp`` say how.
    Inputs, outputs and states are those of :func:`mom_compile.export.to_onnx`, all of them float32 but the token ids.

    Args:
        model: not changed.
        directory: a new folder, or an artifact to replace.
        tokenizer: a ``tokenizer.json`` to put beside the graphs. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states. None: 1e-4 for float32; with the same routing 2e-2
            for float16 and 5e-2 for bfloat16.
        precision: of weights and activations, ``float16``, ``bfloat16`` or ``float32``. States, the router's weight,
            the decay and the sums are float32 in all of them. Below float32 there is also ``prefill_forced.onnx``,
            which takes the routing as ``router_indices.{i}`` ``[B, T, k]``, for verification.
        compute_capabilities: compute capabilities times ten.
        text: a text that the model was not trained on: its bits per byte are verified as well.

    Returns:
        What was compared. The graphs run on such a GPU alone: where there is none, the report says that their structure
        was checked and nothing else; run ``verify`` there.

    Raises:
        ValueError: an unknown precision or compute capability, sizes that the kernels do not take, a folder that holds
            something else, or an artifact that missed its tolerance (nothing is left behind).
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}; choose one of them")
    check_compute_capabilities(compute_capabilities)
    check_alignment(model.config, _dtypes(precision))
    runtime = check_onnx_packages()
    capabilities = list(dict.fromkeys(compute_capabilities))
    graphs = {**GRAPHS, **({} if precision == "float32" else {FORCED_GRAPH: f"{FORCED_GRAPH}.onnx"})}

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        io, weights = write_kernel_graphs(exact, folder, precision, capabilities, list(graphs))
        return {
            "kind": "onnx",
            "target": TARGET,
            "precision": precision,
            "graphs": graphs,
            "compute_capabilities": capabilities,
            "io": io,
            "common_weights": weights,
            "versions": {**package_versions("onnx", "triton"), "onnxruntime": runtime.__version__},
        }

    if tolerance is None:
        tolerance = TOLERANCES[precision]
    return write_artifact(model, directory, tokenizer, tolerance, write_files, text)


def _dtypes(precision: str) -> Dtypes:
    return Dtypes(getattr(torch, precision), torch.float32)


def write_kernel_graphs(
    exact: MoMForCausalLM, folder: Path, precision: str, compute_capabilities: Sequence[int], graphs: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The graphs of a model in float32, their kernels and, where it can be built, their library; returns what
    :func:`.kernel_graphs.write_graphs` does."""
    dtypes = _dtypes(precision)
    written = write_graphs(exact, folder, dtypes, compute_capabilities[0], graphs)
    kernels = folder / KERNELS_FOLDER
    kernels.mkdir()
    write_pack(kernels, exact.config, dtypes, compute_capabilities, (*SOURCES[:2], CUDA_OPERATORS.sources[0]))
    CUDA_OPERATORS.build(kernels)
    return written
