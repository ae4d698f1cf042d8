"""Writing a model repository for the Triton Inference Server, which keeps the state of every sequence by itself."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MoMConfig
from ..model import MoMForCausalLM
from .onnx_artifact import check_onnx_packages, save_graphs, standard_graph
from .program import flat_shapes, state_names
from .stored_state import check_state_dtype
from .writing import package_versions, write_artifact

if TYPE_CHECKING:
    from ..report import Report

REPOSITORY, MODEL_NAME, CONFIG_FILE = "models", "mom", "config.pbtxt"
MODEL_FILE = f"{REPOSITORY}/{MODEL_NAME}/1/model.onnx"
STATE_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
MAX_BATCH, MAX_SEQUENCES, IDLE_SECONDS = 64, 1024, 600

_README = """# A MoM language model for the Triton Inference Server

    tritonserver --model-repository={repository}

`{config}` maps every past state to its present one (implicit state), so the server carries
the state from request to request of a sequence and starts it at zero. A request takes `input_ids` [B, T] int64, one
token or a whole prompt, and returns `logits` [B, T, {vocab_size}]; it bears a correlation id (`sequence_id`),
`sequence_start` on the first request and `sequence_end` on the last:

    client.infer("{model}", [input_ids], sequence_id=7, sequence_start=True)   # the prompt
    client.infer("{model}", [token], sequence_id=7)                            # a token each

The server needs {state_kib:.0f} KiB of state for each sequence, for at most {sequences} at once; one that is silent for
{idle} seconds is dropped. The graph holds standard operators of opset {opset}; ONNX Runtime {runtime} verified it.
"""


def to_triton_server(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-4,
    state_dtype: str = "float32",
) -> Report:
    """Export to a model repository for the Triton Inference Server, and verify its graph in onnxruntime.

    The folder holds ``models/mom/config.pbtxt``, ``models/mom/1/model.onnx`` (standard operators, any batch and length)
    with its weights, a ``README.md`` that says how to serve it, ``manifest.json``, a reference to verify against later
    and a tokenizer. :func:`mom_compile.export.load` runs the graph without a server.

    Args:
        model: exported in float32; not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        tokenizer: a ``tokenizer.json`` to put into the folder. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states against the PyTorch model.
        state_dtype: of the recurrent states, ``float32`` or ``float16``; the arithmetic is float32.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: another state_dtype, a folder that holds something else, or an artifact that missed its tolerance
            (nothing is left).
        ImportError: onnx, onnxscript or onnxruntime is missing.

    Source: the server's model configuration, sequence batcher and implicit state management.
    """
    check_state_dtype(state_dtype, tuple(STATE_TYPES))
    runtime = check_onnx_packages()

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        config, path = exact.config, folder / MODEL_FILE
        path.parent.mkdir(parents=True)
        io = save_graphs(path.parent, [("prefill", path.name, lambda: standard_graph(exact, "prefill", state_dtype))])
        (path.parent.parent / CONFIG_FILE).write_text(server_config(config, state_dtype), encoding="utf-8")
        width = {"recurrent_state": 2 if state_dtype == "float16" else 4}
        layer_bytes = sum(math.prod(shape) * width.get(name, 4) for name, shape in flat_shapes(config, 1).items())
        readme = _README.format(
            repository=REPOSITORY,
            config=f"{REPOSITORY}/{MODEL_NAME}/{CONFIG_FILE}",
            model=MODEL_NAME,
            vocab_size=config.vocab_size,
            state_kib=config.num_hidden_layers * layer_bytes / 2**10,
            sequences=MAX_SEQUENCES,
            idle=IDLE_SECONDS,
            opset=io["prefill"]["opsets"]["ai.onnx"],
            runtime=runtime.__version__,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
        return {
            "kind": "onnx",
            "target": "triton-server",
            "state_dtype": state_dtype,
            "graphs": {"prefill": MODEL_FILE},
            "io": io,
            "versions": {**package_versions("onnx", "onnxscript"), "onnxruntime": runtime.__version__},
        }

    return write_artifact(model, directory, tokenizer, tolerance, write_files)


def server_config(config: MoMConfig, state_dtype: str) -> str:
    """The text of config.pbtxt. The first axis of every tensor is the server's batch, so no shape names it."""
    types = {"conv_state": "TYPE_FP32", "recurrent_state": STATE_TYPES[state_dtype]}
    states = "".join(
        _STATE.format(layer=layer, name=name, type=types[name], dims=_dims(flat_shapes(config, 1)[name][1:]))
        for layer, name in state_names(config)
    )
    return (
        f'name: "{MODEL_NAME}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH}\n'
        'input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]\n'
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ -1, {config.vocab_size} ] }} ]\n'
        f"sequence_batching {{\n  max_sequence_idle_microseconds: {IDLE_SECONDS * 10**6}\n"
        f"  oldest {{ max_candidate_sequences: {MAX_SEQUENCES} }}\n{states}}}\n"
    )


_STATE = """  state {{
    input_name: "past_key_values.{layer}.{name}"
    output_name: "present.{layer}.{name}"
    data_type: {type}
    dims: [ {dims} ]
    initial_state {{ name: "zeros" data_type: {type} dims: [ {dims} ] zero_data: true }}
  }}
"""


def _dims(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
