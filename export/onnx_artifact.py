"""Writing an ONNX artifact: prefill and decode graphs over one weights file, verified before the folder appears."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._extras import check_installed
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..mom_attention import Form
from ._onnxruntime import CPU_GATED_DELTA_NET, require_onnxruntime, runtime_version
from .calibration import round_weights
from .cpu_graphs import decode_cpu_graph, prefill_cpu_graph
from .lowerings import lowerings
from .microsoft_nodes import join_residuals
from .onnx_runner import CUDA_GRAPH, FORCED_GRAPH, FUSED_GRAPHS, TOUCHED_GRAPH, transposed_name
from .operator_library import add_cpu_operators
from .precision import TOLERANCES, check_precision, lower_precision
from .products import gather_parts, join_products
from .program import export_forced, export_program, state_names, touched_names
from .stored_state import check_state_dtype
from .structure import describe_graph
from .token_nodes import TRANSPOSED_RULES, transposed_step
from .views import merge_views, remove_unused
from .weights_file import WEIGHTS_FILE, WeightsFile
from .writing import package_versions, write_artifact

if TYPE_CHECKING:
    from ..data import TokenStream
    from ..report import Report

TARGETS = ("onnxruntime", "portable", "opset27")
OPSET = 20
# The exporter's newest; LinearAttention and CausalConvWithState became standard operators in the one after it.
NEWEST_OPSET = 26
GRAPHS = {"prefill": "prefill.onnx", "decode": "decode.onnx"}
RUN_FILES = {"run.py": "run_template.py", "run.cpp": "cpp/run.cpp"}
INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can read them


def to_onnx(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    target: str = "onnxruntime",
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    precision: str = "float32",
    text: TokenStream | None = None,
    state_dtype: str = "float32",
) -> Report:
    """Export to ONNX with the state as explicit inputs and outputs, and verify the result.

    The folder holds ``prefill.onnx`` (any batch and length), ``decode.onnx`` (one token), their common ``weights.bin``,
    ``manifest.json``, a reference to verify against later, ``run.py``, ``run.cpp`` and a tokenizer. For onnxruntime
    there is also ``decode_touched.onnx``: of the state it gives only the memories that the token selected,
    ``present.{i}.touched_state`` ``[B, k'*HV, K, V]``, ``present.{i}.touched_conv_state`` ``[B, k'*C, W-1]`` and
    ``present.{i}.touched_index`` ``[B, k']``, k' = k + 1 with the shared memory, to be written back.

    In float32 with float32 states there are also ``prefill_cpu.onnx`` and ``decode_cpu.onnx`` for onnxruntime, the
    same by operators of ours: ``mom_cpu.cpp`` and, where g++ and ONNX Runtime's headers are found
    (``ONNXRUNTIME_INCLUDE``), its library ``libmom_cpu_<machine>.so``; elsewhere the first lines of the source say how
    to build it.

    In float16 there is also ``decode_cuda.onnx`` for onnxruntime's CUDA provider, where a model has delta rules and K =
    V: its recurrent states are transposed, ``past_key_values.{i}.transposed_state`` ``[B, M'*HV, V, K]``.

    Inputs: ``input_ids`` ``[B, T]`` int64, ``past_key_values.{i}.conv_state`` ``[B, M'*C, W-1]`` and
    ``past_key_values.{i}.recurrent_state`` ``[B, M'*HV, K, V]``, float32 unless asked otherwise. Outputs: ``logits``
    ``[B, T, vocab_size]`` and ``present.{i}.*`` in the same shapes.

    Args:
        model: exported in float32; not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        target: ``onnxruntime`` (com.microsoft::LinearAttention, fast), ``portable`` (standard operators only) or
            ``opset27`` (standard operators, LinearAttention and CausalConvWithState of opset 27 among them).
        tokenizer: a ``tokenizer.json`` to put beside the graphs. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states against the PyTorch model. None: 1e-4; below float32,
            2e-2 for the logits with the same routing. A model of random weights does not keep within that in int4.
        precision: ``float32``, or for onnxruntime ``float16``, ``int8`` or ``int4`` (weights alone; in int4 those of k
            and v have 4 bits, rounded on texts that the model draws, the others 8). Inputs, outputs, states, the
            router's projection and the log decay are float32 in all of them. Below float32 there is also
            ``prefill_forced.onnx``, a prefill that takes the routing as ``router_indices.{i}`` ``[B, T, k]``, for
            verification.
        text: a text that the model was not trained on: its bits per byte are verified as well, and below float32 the
            logits on it in place of random tokens, on which a trained model answers noise.
        state_dtype: of the recurrent states that the graphs take and give: ``float32``, ``float16`` or ``bfloat16``
            (which numpy has through ml_dtypes). The arithmetic is float32 in all of them; a ``conv_state`` stays so.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: an unknown target, precision or state_dtype, a folder that holds something else, or an artifact that
            missed its tolerance (nothing is left behind).
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}; choose one of them")
    check_precision(precision, target)
    check_state_dtype(state_dtype)
    if tolerance is None:
        tolerance = TOLERANCES[precision]
    runtime = check_onnx_packages()

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        graphs = _write_graphs(exact, folder, target, precision, state_dtype)
        for name, source in RUN_FILES.items():
            text = resources.files(__package__ or "").joinpath(source).read_text(encoding="utf-8")
            (folder / name).write_text(text, encoding="utf-8")
        files = graph_files(exact.config, target, precision, state_dtype)
        if FUSED_GRAPHS["decode"] in files:
            add_cpu_operators(folder)
        return {
            "kind": "onnx",
            "target": target,
            "precision": precision,
            "state_dtype": state_dtype,
            "graphs": files,
            "io": graphs,
            "versions": {**package_versions("onnx", "onnxscript"), "onnxruntime": runtime.__version__},
        }

    return write_artifact(model, directory, tokenizer, tolerance, write_files, text)


def check_onnx_packages() -> ModuleType:
    """onnxruntime, once everything that an export needs is known to be there.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    check_installed(("onnx", "onnxscript", "onnx_ir"), "onnx")
    return require_onnxruntime()


def _write_graphs(model: MoMForCausalLM, folder: Path, target: str, precision: str, state_dtype: str) -> dict[str, Any]:
    """The graphs and their weights; returns their description for the manifest."""
    files = graph_files(model.config, target, precision, state_dtype)
    rounded = round_weights(model) if precision == "int4" else None

    # Below that the weights of k and v are known by their contents, and rounded on their own.
    join = precision in ("float32", "float16")

    def make(name: str) -> Any:
        if name in FUSED_GRAPHS.values():
            return decode_cpu_graph(model) if name == FUSED_GRAPHS["decode"] else prefill_cpu_graph(model)
        return lower_precision(_graph(model, target, name, state_dtype, join), precision, rounded)

    return save_graphs(folder, ((name, file, partial(make, name)) for name, file in files.items()))


def graph_files(
    config: MoMConfig, target: str, precision: str = "float32", state_dtype: str = "float32"
) -> dict[str, str]:
    """Graph name -> file.

    The touched decode is for onnxruntime, where a token leaves some memories alone; those of operators of ours for
    what they take; that for CUDA for the precision that one has there; the prefill whose routing is given is for the
    verification of what is below float32.
    """
    names = [TOUCHED_GRAPH] if target == "onnxruntime" and config.topk < config.num_memories else []
    names += FUSED_GRAPHS.values() if target == "onnxruntime" and precision == state_dtype == "float32" else []
    names += [CUDA_GRAPH] if target == "onnxruntime" and precision == "float16" and _fits_cuda_graph(config) else []
    names += [FORCED_GRAPH] if precision != "float32" else []
    return {**GRAPHS, **{name: f"{name}.onnx" for name in names}}


def _fits_cuda_graph(config: MoMConfig) -> bool:
    """Whether the rules and sizes are those of :func:`.token_nodes.transposed_step`, and it can be verified."""
    if runtime_version(require_onnxruntime()) < CPU_GATED_DELTA_NET:
        return False
    rules = {config.rule(layer) for layer in range(config.num_hidden_layers)}
    return rules <= set(TRANSPOSED_RULES) and config.head_dim == config.value_dim


def save_graphs(folder: Path, graphs: Iterable[tuple[str, str, Callable[[], Any]]]) -> dict[str, Any]:
    """Save (name, file, maker of an onnx_ir model) over one weights file; returns their description by name."""
    import onnx_ir as ir

    weights = WeightsFile(folder / WEIGHTS_FILE)
    files = {}
    try:
        for name, file, make in graphs:
            graph_model = make()
            graph_model.graph.name = f"mom_{name}"
            for value in graph_model.graph.initializers.values():
                if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                    value.const_value = weights.place(value.const_value)
            ir.save(graph_model, folder / file)
            files[name] = file
    finally:
        weights.close()
    return {name: describe_graph(folder / file) for name, file in files.items()}


def standard_graph(model: MoMForCausalLM, name: str, state_dtype: str = "float32") -> Any:
    """A graph of standard operators alone, ``prefill`` or ``decode``, as an onnx_ir model."""
    return _graph(model, "portable", name, state_dtype)


def _graph(model: MoMForCausalLM, target: str, name: str, state_dtype: str = "float32", join: bool = True) -> Any:
    """One graph as an onnx_ir model; ``join``: for onnxruntime, the products of one x as one."""
    decode, touched = name.startswith("decode"), name == TOUCHED_GRAPH
    table = lowerings(target, decode)
    if name == CUDA_GRAPH:
        table |= {torch.ops.mom.decode_step: transposed_step, torch.ops.mom.decode_step.default: transposed_step}
    with quiet():
        forms: dict[str, Form] = {"tensorrt": "dense", "onnxruntime": "step"}
        form = forms.get(target, "portable") if decode else "portable"
        if name == FORCED_GRAPH:
            program = export_forced(model, table, state_dtype)
        else:
            program = export_program(model, decode, table, touched, form, state_dtype=state_dtype)
    states = [f"{layer}.{state}" for layer, state in state_names(model.config)]
    if name == CUDA_GRAPH:
        states = [transposed_name(state) for state in states]
    present = states
    if touched:
        parts = touched_names(model.config).values()
        present = [f"{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in parts]
    length = None if decode else "sequence"
    inputs = {"input_ids": length}
    if name == FORCED_GRAPH:
        inputs |= {f"router_indices.{layer}": length for layer in range(model.config.num_hidden_layers)}
    inputs |= dict.fromkeys(f"past_key_values.{n}" for n in states)
    outputs = {"logits": length, **dict.fromkeys(f"present.{n}" for n in present)}
    if target != "opset27":
        own = target == "onnxruntime"
        result = convert(program, inputs, outputs, merge=own, join=own and join)
        if own and decode:  # of a token the parts are small
            gather_parts(result.graph)
        return result
    result = convert(program, inputs, outputs, NEWEST_OPSET)
    _standardise(result)
    return result


def _standardise(model: Any) -> None:
    """Give com.microsoft's LinearAttention and CausalConvWithState the names of opset 27, which mean the same."""
    for node in model.graph.all_nodes():
        if node.domain == "com.microsoft":
            node.domain = ""
            node.version = None
    model.opset_imports.clear()
    model.opset_imports[""] = NEWEST_OPSET + 1


def convert(
    program: torch.export.ExportedProgram,
    inputs: Mapping[str, str | None],
    outputs: Mapping[str, str | None],
    opset: int = OPSET,
    merge: bool = False,
    join: bool = False,
) -> Any:
    """An exported program as an onnx_ir model.

    ``inputs`` and ``outputs``: name -> name of the symbolic axis 1, None where that axis is fixed. Axis 0 is the batch.
    ``merge``: chains of views become one; ``join``: so do products of one x, see :func:`join_products`.
    """
    with quiet(), _linear_rewriting():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert onnx_program is not None
    result = onnx_program.model
    _fold_weights(result.graph)
    join_residuals(result.graph)
    if merge:
        merge_views(result.graph)
    if join:
        join_products(result.graph)
    _name_axes(result.graph, {**inputs, **outputs})
    _strip(result)
    return result


def _fold_weights(graph: Any) -> None:
    """Store each weight as its product reads it: a runtime would lay it out anew in every session, in a copy each."""
    import onnx_ir as ir

    for node in list(graph):
        values = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
        if node.op_type not in ("Reshape", "Transpose") or len(values) < len(node.inputs):
            continue
        data = values[0].numpy()
        if node.op_type == "Reshape":
            data = data.reshape([size or data.shape[axis] for axis, size in enumerate(values[1].numpy().tolist())])
        else:
            data = data.transpose(node.attributes["perm"].as_ints())
        old = node.outputs[0]
        new = ir.Value(name=f"{old.name}_weight", type=old.type, shape=ir.Shape(data.shape))
        new.const_value = ir.tensor(np.ascontiguousarray(data), name=new.name)
        graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
    remove_unused(graph)


def _name_axes(graph: Any, axes: Mapping[str, str | None]) -> None:
    """Name the symbolic axes of inputs and outputs, and forget those of intermediate values."""
    import onnx_ir as ir

    # The exporter's own names (s56, 64*((s70+63)//64)) mean nothing to a reader; a runtime infers the inner shapes.
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in graph.outputs and value.shape is not None and any(map(_is_symbolic, value.shape)):
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(
            "batch" if axis == 0 else axes[value.name] or size if axis == 1 else size
            for axis, size in enumerate(value.shape)
        )


def _is_symbolic(size: Any) -> bool:
    return not isinstance(size, int)


def _strip(model: Any) -> None:
    """Remove stack traces and module paths: they name files of the exporting machine."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in _graphs(model.graph):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the bodies inside it."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                yield from _graphs(attribute.as_graph())


@contextmanager
def _linear_rewriting() -> Iterator[None]:
    """Without the optimizer's rules that match several nodes at once: each scans the whole graph for every node.

    There is one, SlicesSplit, of no use here; with it a graph of 24 layers takes longer than all the rest of an export.
    """
    from onnxscript import rewriter

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is None:
        yield
        return
    patterns = [getattr(rule, "_target_pattern", None) for rule in rules]
    kept = [rule for rule, p in zip(rules, patterns, strict=True) if p is None or p.has_single_output_node]
    rewriter._DEFAULT_REWRITE_RULES = type(rules)(kept)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages and symbols that concern nobody here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
