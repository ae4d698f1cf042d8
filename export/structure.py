"""What an ONNX graph takes, gives and is made of, and whether an artifact promises just that. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._extras import require
from ..config import MoMConfig
from .onnx_runner import FUSED_GRAPHS
from .stored_state import state_dtype_of

ENGINE_PAGE = (256, 1, 8)  # block size, heads and head size of the layer that GenAI's engine wants beside ours
ENGINE_INPUTS = {
    "cumulative_sequence_lengths": ["batch_size_plus_1"],
    "past_sequence_lengths": ["batch_size"],
    "block_table": ["batch_size", "max_num_blocks"],
}
STANDARD_DOMAINS = ("", "ai.onnx")
OWN_DOMAIN = "mom"
"""Of the operators of ``cpp/mom_onnx.cpp`` and ``cpp/mom_cpu.cpp``."""
TARGET_DOMAINS = {
    "portable": STANDARD_DOMAINS,
    "triton-server": STANDARD_DOMAINS,
    "tensorrt": STANDARD_DOMAINS,
    "opset27": STANDARD_DOMAINS,
    "onnxruntime": (*STANDARD_DOMAINS, "com.microsoft"),
    "onnxruntime-cuda": (*STANDARD_DOMAINS, OWN_DOMAIN),
}


def describe_graph(path: Path) -> dict[str, Any]:
    """Inputs and outputs (name, dtype, shape), opsets and operator counts of a saved graph."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(path), load_external_data=False)
    return {
        "inputs": [_describe_value(onnx, value) for value in model.graph.input],
        "outputs": [_describe_value(onnx, value) for value in model.graph.output],
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "operators": dict(sorted(Counter(_operator(node) for node in _nodes(model)).items())),
    }


def expected_io(
    config: MoMConfig, shapes: Mapping[str, tuple[int, ...]], graph: str, state_dtype: str = "float32"
) -> dict[str, list[dict[str, Any]]]:
    """The inputs and outputs of the design's contract: tokens and the past state in, logits and the present state out.

    Args:
        config: of the model.
        shapes: one layer's state by name, without the batch, memories and heads (channels) apart.
        graph: ``prefill``, ``decode``, ``prefill_cpu``, ``decode_cpu``,
            ``decode_touched``, whose states are the selected memories' alone,
            ``decode_cuda``, whose recurrent states are transposed,
            ``prefill_forced``, which takes the routing, GenAI's ``model``, which has an attention mask and always a
            ``conv_state``, or its ``engine``, which takes packed tokens and a paged cache.
        state_dtype: of the recurrent states.
    """
    length: int | str = 1 if graph.startswith("decode") else "sequence"
    states = ("recurrent_state", "touched_state", "transposed_state")
    dtypes = {"touched_index": "int64", **dict.fromkeys(states, state_dtype)}
    flat = {name: (shape[0] * shape[1], *shape[2:]) for name, shape in shapes.items()}
    if graph in ("model", "engine"):
        flat = {"conv_state": (1, 1), **flat}

    def state(prefix: str, entries: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        return [
            {
                "name": f"{prefix}.{layer}.{name}",
                "dtype": dtypes.get(name, "float32"),
                "shape": ["batch", *shape],
            }
            for layer in range(config.num_hidden_layers)
            for name, shape in entries.items()
        ]

    if graph == "decode_cuda":
        heads, key_dim, value_dim = flat.pop("recurrent_state")
        flat["transposed_state"] = (heads, value_dim, key_dim)
    present = flat
    if graph == "decode_touched":
        selected = config.topk + config.shared_mem
        present = {
            "touched_" + name.removeprefix("recurrent_"): (selected * shape[1], *shape[2:])
            for name, shape in shapes.items()
        }
        present["touched_index"] = (selected,)
    inputs: list[dict[str, Any]] = [{"name": "input_ids", "dtype": "int64", "shape": ["batch", length]}]
    if graph == "prefill_forced":
        inputs += [
            {"name": f"router_indices.{layer}", "dtype": "int64", "shape": ["batch", length, config.topk]}
            for layer in range(config.num_hidden_layers)
        ]
    if graph == "model":
        inputs.append({"name": "attention_mask", "dtype": "int64", "shape": ["batch", "total_sequence"]})
    logits: list[int | str] = ["batch", length, config.vocab_size]
    pages: dict[str, list[dict[str, Any]]] = {"past_key_values": [], "present": []}
    if graph == "engine":
        inputs = [{"name": "input_ids", "dtype": "int64", "shape": ["num_tokens"]}]
        for name, shape in ENGINE_INPUTS.items():
            inputs.append({"name": name, "dtype": "int32", "shape": shape})
        logits = ["batch_size", config.vocab_size]
        for prefix, values in pages.items():
            for name in ("key", "value"):
                page = {"dtype": "float32", "shape": ["num_blocks", *ENGINE_PAGE]}
                values.append({"name": f"{prefix}.{config.num_hidden_layers}.{name}", **page})
    return {
        "inputs": inputs + state("past_key_values", flat) + pages["past_key_values"],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": logits},
            *state("present", present),
            *pages["present"],
        ],
    }


def check_structure(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless every graph of the folder passes the checker, has the contract's names, shapes and domains, and is
    right when past and present share a buffer.

    Raises:
        ValueError: names the graph and what differs.
    """
    onnx = require("onnx", "onnx")
    config = MoMConfig.from_dict(manifest["config"])
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in manifest["state"]}
    for name, file in manifest["graphs"].items():
        allowed = TARGET_DOMAINS[manifest["target"]]
        if name in FUSED_GRAPHS.values():
            allowed = (*allowed, OWN_DOMAIN)
        path = folder / file
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:
            raise ValueError(f"{file} must pass the ONNX checker, got {str(error).strip()[:500]}") from error
        description = describe_graph(path)
        expected = expected_io(config, shapes, name, state_dtype_of(manifest))
        for side in ("inputs", "outputs"):
            for want, got in zip(expected[side], description[side], strict=False):
                if want != got:
                    raise ValueError(f"{file} must have {want} among its {side}, got {got}; export again")
            if len(expected[side]) != len(description[side]):
                raise ValueError(
                    f"{file} must have {len(expected[side])} {side}, got {len(description[side])}; export again"
                )
        foreign = sorted(operator for operator in description["operators"] if _domain(operator) not in allowed)
        if foreign:
            raise ValueError(f"{file} must hold operators of {allowed} alone, got {', '.join(foreign)}; export again")
        problem = late_reader(onnx.load(str(path), load_external_data=False).graph)
        for part in ("opsets", "operators"):
            if description[part] != manifest["io"][name][part]:
                raise ValueError(
                    f"{file} must have the {part} in manifest.json {manifest['io'][name][part]}, got "
                    f"{description[part]}; export again"
                )
        if problem is not None:
            raise ValueError(
                f"{file} must read a past state only before it writes its present one, got {problem}; a runtime that "
                "gives both one buffer would compute nonsense: export again"
            )


# Operators whose output may be their input's memory.
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def late_reader(graph: Any) -> str | None:
    """A node that may read ``past_key_values.x`` after ``present.x`` is written, or None.

    Runtimes order nodes as they like within the dependencies, so every other reader must be an ancestor of the node
    that writes; readers through a view count, the view may be the same memory.
    """
    producer = {output: index for index, node in enumerate(graph.node) for output in node.output}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in [*node.input, *_captured(node)]:
            readers.setdefault(name, []).append(index)
    for value in graph.output:
        if not value.name.startswith("present."):
            continue
        writer = producer[value.name]
        ancestors, pending = {writer}, [writer]
        while pending:
            node = graph.node[pending.pop()]
            sources = {producer[name] for name in [*node.input, *_captured(node)] if name in producer}
            pending += sources - ancestors
            ancestors |= sources
        views = [value.name.replace("present.", "past_key_values.")]
        for view in views:
            for index in readers.get(view, ()):
                node = graph.node[index]
                if index not in ancestors and node.op_type != "Shape":  # which reads no values
                    return f"{node.op_type} {node.name} beside the writer of {value.name}"
                if node.op_type in _VIEWS:
                    views += node.output
    return None


def _captured(node: Any) -> Iterator[str]:
    """Names that the bodies of a node use."""
    for inner in _walk([node]):
        if inner is not node:
            yield from inner.input


def _domain(operator: str) -> str:
    return operator.rpartition("::")[0]


def _operator(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in STANDARD_DOMAINS else node.op_type


def _nodes(model: Any) -> Iterator[Any]:
    """Every node: of the graph, of the bodies inside it and of the model's functions."""
    for owner in (model.graph, *model.functions):
        yield from _walk(owner.node)


def _walk(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)


def _describe_value(onnx: Any, value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": [size.dim_param or size.dim_value for size in tensor.shape.dim],
    }
