"""Graphs below float32 by onnxruntime's own tools: float16, and weights of 8 or 4 bits."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .products import join_swiglu
from .views import remove_unused

if TYPE_CHECKING:
    from .calibration import Rounded

# Precision -> largest relative error of the logits with the same routing. Weights of 4 bits are themselves off by 5 to
# 10 %, which random weights pass on: only a trained model keeps within it. bfloat16 rounds eight times as coarsely as
# float16, and puts torch's own logits of two small layers off by 3e-2.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2, "int8": 2e-2, "int4": 2e-2}
ONNXRUNTIME = ("float32", "float16", "int8", "int4")
# Precision -> largest share by which it may raise the bits per byte of a held-out text.
BITS_PER_BYTE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-3, "int8": 1e-2, "int4": 4e-2}
# Below float32 and both running free: the smallest share of choices in common with the model, and a bound on its margin
# (a difference of probabilities) where they differ.
ROUTING_AGREEMENT, ROUTING_MARGIN = 0.995, 1e-2
BLOCK_SIZE = 16  # weights that share a scale and a zero point
# Sums of squares overflow float16; the memory rule, its state and its decay stay float32.
_FLOAT, _FLOAT16 = 1, 10  # onnx.TensorProto
_SHAPE_SIZE = 64  # values of a constant that may be a shape
_FLOAT32_OPERATORS = ("LinearAttention", "GatedDeltaNet", "Pow", "ReduceMean", "ReduceSum", "Sqrt", "Reciprocal")


def check_precision(precision: str, target: str) -> None:
    """Raise ValueError for an unknown precision, or one that the target does not have."""
    if precision not in ONNXRUNTIME:
        raise ValueError(f"precision must be one of {', '.join(ONNXRUNTIME)}, got {precision!r}; choose one of them")
    if precision != "float32" and target != "onnxruntime":
        raise ValueError(
            f"precision must be float32 for target {target}, got {precision!r}; use target onnxruntime for {precision}"
        )


def lower_precision(model: Any, precision: str, rounded: Mapping[bytes, Rounded] | None = None) -> Any:
    """An onnx_ir model in another precision; the router's and the decay's path stays float32, as do inputs and outputs.

    float16: weights and activations. int8: the weights of matrix products alone, in blocks of 16. int4: those among
    them that are ``rounded`` in 4 bits, see :func:`mom_compile.export.calibration.round_weights`, the others in 8.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import IdentityEliminationPass

    if precision == "float32":
        return model
    proto = ir.to_proto(model)
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{index}"
    router = list(_router_path(proto.graph))
    floats = {  # by node: the float16 tool renames values
        (node.name, index)
        for node, typed in zip(proto.graph.node, model.graph, strict=True)
        for index, value in enumerate(typed.outputs)
        if value.type is not None and value.dtype == ir.DataType.FLOAT
    }
    for logger in ("onnxruntime.transformers.float16", "onnxruntime.quantization.matmul_nbits_quantizer"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if precision == "float16":
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

        kept = [*router, *_state_path(proto.graph), *_norm_additions(proto.graph)]
        operators = [*DEFAULT_OP_BLOCK_LIST, *_FLOAT32_OPERATORS]
        _infer_shapes(proto)
        proto = convert_float_to_float16(
            proto, keep_io_types=True, disable_shape_infer=True, op_block_list=operators, node_block_list=kept
        )
        _drop_repeated(proto.graph)
        _join_float32(proto.graph, floats, kept, operators)
    else:
        if precision == "int4":
            proto = _place(proto, {} if rounded is None else rounded)
        proto = _quantize(proto, 8, router)
    del proto.graph.value_info[:]  # float16's are partly wrong; a runtime infers them
    result = ir.from_proto(proto)
    result.graph.sort()  # the tools append their nodes at the end
    IdentityEliminationPass()(result)
    if precision == "float16":
        join_swiglu(result.graph)
    remove_unused(result.graph)
    return result


def _quantize(proto: Any, bits: int, excluded: list[str]) -> Any:
    """The weights of all products but the excluded ones, asymmetric in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        proto, bits=bits, block_size=BLOCK_SIZE, is_symmetric=False, nodes_to_exclude=excluded
    )
    quantizer.process()
    return quantizer.model.model


def _infer_shapes(proto: Any) -> None:
    """Write the types and shapes of a graph's values, inferred without its weights: a message ends at 2 GB."""
    from onnx import shape_inference

    light = type(proto)(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(proto.graph, field))
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= _SHAPE_SIZE:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    inferred = shape_inference.infer_shapes(light).graph.value_info
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inferred)


def _drop_repeated(graph: Any) -> None:
    """Keep one of the casts of a value: up to onnxruntime 1.31 each of its readers brought one, under the same name."""
    nodes = {tuple(node.output): node for node in graph.node}
    if len(nodes) < len(graph.node):
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes.values()]
        del graph.node[:]
        graph.node.extend(kept)


def _join_float32(
    graph: Any, floats: Collection[tuple[str, int]], kept: Collection[str], operators: Collection[str]
) -> None:
    """Take the detour through float16 out from between two nodes that both stayed float32: the tool puts one there.

    ``floats``: (node, output) of the values that were float32 before; ``kept``, ``operators``: what stayed so.
    """
    float32 = {value.name for value in graph.input if value.type.tensor_type.elem_type == _FLOAT}
    float32 |= {x.name for x in graph.initializer if x.data_type == _FLOAT}
    for node in graph.node:
        if node.name in kept or node.op_type in operators:
            float32.update(name for index, name in enumerate(node.output) if (node.name, index) in floats)
    source = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i == _FLOAT16 and node.input[0] in float32
    }
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == _FLOAT:
            origin = source.get(node.input[0], node.input[0])
            if origin in float32:
                node.op_type, node.input[0] = "Identity", origin
                del node.attribute[:]


def _place(proto: Any, rounded: Mapping[bytes, Rounded]) -> Any:
    """Products of weights that are rounded, in 4 bits: the quantizer's nodes, with the levels that were chosen."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    found: dict[str, Rounded] = {}
    for node in proto.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            key = hashlib.sha256(numpy_helper.to_array(weights[node.input[1]]).tobytes()).digest()
            if key in rounded:
                found[node.name] = rounded[key]
    proto = _quantize(proto, 4, [node.name for node in proto.graph.node if node.name not in found])
    places = {node.name.removesuffix("_Q4"): node for node in proto.graph.node if node.op_type == "MatMulNBits"}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, value in found.items():
        for target, array in zip(places[name].input[1:4], _packed(value), strict=True):
            expected = tuple(tensors[target].dims)
            tensors[target].CopyFrom(numpy_helper.from_array(array.reshape(expected), target))
    return proto


def _packed(value: Rounded) -> tuple[NDArray[Any], ...]:
    """Levels, scales and zero points as MatMulNBits reads them: by column of the weight, two levels a byte."""
    padding = -len(value.levels) % BLOCK_SIZE
    return (
        _nibbles(np.pad(value.levels, ((0, padding), (0, 0))).T),
        value.scales.T.astype(np.float32),
        _nibbles(value.zero_points.T),
    )


def _nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pairs along the last axis, the first in the low half."""
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return (values[:, ::2] | (values[:, 1::2] << 4)).astype(np.uint8)


def _norm_additions(graph: Any) -> Iterator[str]:
    """Names of the nodes that add epsilon to a mean or a sum of squares."""
    sums = {output for node in graph.node if node.op_type in ("ReduceMean", "ReduceSum") for output in node.output}
    for node in graph.node:
        if node.op_type == "Add" and sums.intersection(node.input):
            yield node.name


def _router_path(graph: Any) -> Iterator[str]:
    """Names of the nodes from a router's projection to what uses its results; it computes decay and beta as well."""
    producer = {output: node for node in graph.node for output in node.output}
    readers = _readers(graph)
    projections = {}
    for top in graph.node:
        forced = top.op_type == "GatherElements" and top.input[1].startswith("router_indices.")
        if top.op_type != "TopK" and not forced:
            continue
        pending = [top.input[0]]
        while pending:
            source = producer.get(pending.pop())
            if source is not None and source.op_type in ("MatMul", "Gemm"):
                projections[source.name] = source
            elif source is not None:
                pending += source.input
    ends = ("MatMul", "Gemm", "LinearAttention", "GatedDeltaNet", "MatMulNBits")
    yield from _behind(list(projections.values()), readers, lambda node: node.op_type in ends)


def _state_path(graph: Any) -> Iterator[str]:
    """Names of the nodes from a state to the norm or the product with weights that reads what the memories gave."""
    readers = _readers(graph)
    weights = {tensor.name for tensor in graph.initializer}
    past = [value.name for value in graph.input if value.name.startswith("past_key_values.")]

    def end(node: Any) -> bool:
        return node.op_type == "GatedRMSNorm" or bool(node.op_type == "MatMul" and node.input[1] in weights)

    yield from _behind([node for name in past for node in readers.get(name, ())], readers, end)


def _readers(graph: Any) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _behind(nodes: list[Any], readers: Mapping[str, list[Any]], end: Callable[[Any], bool]) -> Iterator[str]:
    """Names of the nodes and of all behind them, up to the ends, which are left out."""
    seen: dict[str, None] = {}
    while nodes:
        node = nodes.pop()
        if node.name in seen:
            continue
        seen[node.name] = None
        nodes += [r for output in node.output for r in readers.get(output, ()) if not end(r)]
    yield from seen
