"""Jetson Orin: graphs inside what TensorRT 10.3's parser takes, weights of 4 bits, and how to build on the device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .structure import _walk

PROFILES = ("rtx", "jetpack6")
INT4_BLOCKS = (128, 64)
"""Input rows that share a scale; a product whose rows neither divides stays float16."""
_INT4_OPSET = 21  # the first whose DequantizeLinear has blocks and INT4
_TYPES = {1: "FP32", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 16: "BF16", 3: "INT8", 22: "INT4"}
_CONSTANT_INPUTS = {"CumSum": 1, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "Pad": 3} | {
    f"Reduce{kind}": 1 for kind in ("Max", "Mean", "Min", "Prod", "Sum", "L1", "L2", "SumSquare")
}


def parser_operators() -> dict[str, Any]:
    """``source``, ``opsets`` (first and last) and ``operators`` (name -> dtypes) that TensorRT's parser publishes."""
    text = resources.files(__package__ or "").joinpath("onnx_tensorrt_operators.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result


def check_parser_operators(path: Path) -> None:
    """Raise unless a graph stays inside the operators, dtypes and opsets of TensorRT 10's published list.

    Raises:
        ValueError: names the operators, with what is wrong.
    """
    onnx = require("onnx", "onnx")
    listed = parser_operators()
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    problems = dict.fromkeys(_problems(model.graph, listed["operators"]))
    first, last = listed["opsets"]
    dequantizes = any(node.op_type == "DequantizeLinear" for node in _walk(model.graph.node))
    for entry in model.opset_import:
        if not first <= entry.version <= (_INT4_OPSET if dequantizes else last):
            problems[f"opset {entry.version} of {entry.domain or 'ai.onnx'}"] = None
    if problems:
        raise ValueError(
            f"{path.name} must hold what TensorRT's parser lists, got {', '.join(problems)}; "
            f"the list: {listed['source'].split(' ')[0]}"
        )


def _problems(
    graph: Any, operators: Mapping[str, Sequence[str]], outer: Mapping[str, int] | None = None
) -> Iterator[str]:
    types = dict(outer or {})
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {output for node in graph.node if node.op_type == "Constant" for output in node.output}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in operators:
            yield f"{node.op_type} of {node.domain or 'ai.onnx'}"
            continue
        # The operand that carries the dtype; conditions, indices and axes have their own.
        data = node.input[1 if node.op_type == "Where" else 0] if node.input else node.output[0]
        dtype = types.get(data)
        if dtype is not None and _TYPES.get(dtype, f"type {dtype}") not in operators[node.op_type]:
            yield f"{node.op_type} of {_TYPES.get(dtype, f'type {dtype}')}"
        if node.op_type == "Loop":  # its collected outputs may not have a dynamic length
            yield "Loop"
        index = _CONSTANT_INPUTS.get(node.op_type)
        if index is not None and len(node.input) > index and node.input[index] not in constants | {""}:
            yield f"{node.op_type} with computed axes"
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _problems(body, operators, types)


def quantize_weights(model: Any, precision: str) -> Any:
    """An onnx_ir model whose float16 matrices are signed 4 bits with a float16 scale per block of input rows.

    Each is read through a DequantizeLinear, which TensorRT fuses into the product (weight-only quantization). The
    router's product is float32 and stays as it is, as does the embedding.
    """
    import onnx_ir as ir

    assert precision == "int4"
    graph = model.graph
    done: dict[str, Any] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT16:
            continue
        rows = weight.shape[0]
        block = next((size for size in INT4_BLOCKS if rows % size == 0), None)
        if len(weight.shape) != 2 or block is None:
            continue
        if weight.name not in done:
            packed, scale = _int4(weight.const_value.numpy(), block)
            quantized = ir.Value(name=f"{weight.name}_int4", type=ir.TensorType(ir.DataType.INT4), shape=weight.shape)
            quantized.const_value = ir.PackedTensor(
                packed, ir.DataType.INT4, shape=ir.Shape(weight.shape), name=quantized.name
            )
            scales = ir.Value(name=f"{weight.name}_scale", type=weight.type, shape=ir.Shape(scale.shape))
            scales.const_value = ir.tensor(scale, name=scales.name)
            graph.register_initializer(quantized)
            graph.register_initializer(scales)
            dequantize = ir.node(
                "DequantizeLinear",
                [quantized, scales],
                {"axis": 0, "block_size": block},
                name=f"{weight.name}_dequantize",
            )
            dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, weight.shape
            graph.insert_before(node, dequantize)
            done[weight.name] = dequantize.outputs[0]
        node.replace_input_with(1, done[weight.name])
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    graph.opset_imports[""] = _INT4_OPSET
    return model


def _int4(weight: np.ndarray[Any, Any], block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``[K, N]`` -> two signed 4-bit values a byte, low half first, and the scales ``[K / block, N]``."""
    rows, columns = weight.shape
    blocks = weight.astype(np.float32).reshape(rows // block, block, columns)
    scale = np.maximum(np.abs(blocks).max(1) / 7, 1e-6).astype(np.float16)
    values = np.clip(np.rint(blocks / scale[:, None].astype(np.float32)), -8, 7).astype(np.int8).reshape(-1)
    if len(values) % 2:
        values = np.append(values, np.int8(0))
    nibbles = values.view(np.uint8) & 0xF
    return nibbles[::2] | (nibbles[1::2] << 4), scale


def build_script(lines: Mapping[str, tuple[str, str]], profile: str) -> str:
    """``build.sh``: builds engines from the folder's graphs with trtexec, where the full TensorRT is installed.

    ``lines``: graph -> (engine file, shape options).
    """
    tool, target, where = "trtexec", "trtexec/", "TensorRT 10.3 or later; those of TensorRT for RTX lie here already"
    if profile == "jetpack6":
        tool, target, where = "/usr/src/tensorrt/bin/trtexec", "", "JetPack 6, on the Jetson itself"
    text = [
        "#!/bin/sh",
        f"# Builds the engines with {where}.",
        "# The shapes are the smallest, likeliest and largest; TRTEXEC=path takes another trtexec.",
        "set -eu",
        'cd "$(dirname "$0")"',
        *([f"mkdir -p {target}"] if target else []),
        f'tool="${{TRTEXEC:-{tool}}}"',
    ]
    for name, (engine, shapes) in lines.items():
        options = "--stronglyTyped --noTF32 --skipInference"
        text.append(f'"$tool" --onnx={name}.onnx --saveEngine={target}{engine} {options} {shapes}')
    return "\n".join(text) + "\n"
