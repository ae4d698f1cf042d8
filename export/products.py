"""Products, and parts of them, in the nodes that take fewest launches on a GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .views import remove_unused

GATE_ROW = 256  # channels that one block of threads takes in a gated product


def join_products(graph: Any) -> None:
    """A Concat of products of one x with constant weights ``[K, N]`` as one product, in an onnx_ir graph.

    Graphs that share a weights file must all be joined, or none.
    """
    import onnx_ir as ir

    for concat in list(graph):
        parts = [value.producer() for value in concat.inputs] if concat.op_type == "Concat" else []
        if not parts or any(part is None or part.op_type != "MatMul" for part in parts):
            continue
        x, old = parts[0].inputs[0], concat.outputs[0]
        weights = [part.inputs[1].const_value for part in parts if part.inputs[0] is x]
        joinable = all(weight is not None and len(weight.shape) == 2 for weight in weights)
        last = concat.attributes["axis"].as_int() in (-1, len(old.shape) - 1)
        if len(weights) < len(parts) or not joinable or not last:
            continue
        data = np.concatenate([weight.numpy() for weight in weights], 1)
        joined = ir.Value(name=f"{old.name}_weight", type=old.type, shape=ir.Shape(data.shape))
        joined.const_value = ir.tensor(data, name=joined.name)
        graph.register_initializer(joined)
        product = ir.Node("", "MatMul", [x, joined], outputs=[ir.Value(shape=old.shape, type=old.type)])
        graph.insert_before(concat, product)
        ir.convenience.replace_all_uses_with(old, product.outputs[0])
    remove_unused(graph)


def gather_parts(graph: Any) -> None:
    """Each Split in two unequal parts as two Gathers, in an onnx_ir graph.

    CUDA splits those by a table that it copies from the host: a transfer for a launch, which a CUDA graph would repeat
    from memory that has gone. Equal parts, and three of the last axis, it splits in one launch.
    """
    import onnx_ir as ir

    for node in list(graph):
        given = node.inputs[1].const_value if node.op_type == "Split" and len(node.inputs) > 1 else None
        sizes = [] if given is None else given.numpy().tolist()
        if len(sizes) != 2 or sizes[0] == sizes[1]:
            continue
        begin = 0
        for old, size in zip(node.outputs, sizes, strict=True):
            index = ir.Value(name=f"{old.name}_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([size]))
            index.const_value = ir.tensor(np.arange(begin, begin + size), name=index.name)
            graph.register_initializer(index)
            new = ir.Value(shape=old.shape, type=old.type)
            attributes = [node.attributes["axis"]]
            graph.insert_before(node, ir.Node("", "Gather", [node.inputs[0], index], attributes, outputs=[new]))
            ir.convenience.replace_all_uses_with(old, new)
            begin += size
        graph.remove(node, safe=True)


def join_swiglu(graph: Any) -> None:
    """``a sigmoid(a) b`` of two products in float16 as one GatedRMSNorm whose norm divides by its epsilon alone.

    The mean of b^2 adds its 2^-31th part: in float16 that is more than a rounding only where a b overflows.
    """
    import onnx_ir as ir

    root = 15  # log2 of the largest power of two in float16, which undoes that division
    for node in list(graph):
        if node.op_type != "Mul" or len(node.inputs) != 2:
            continue
        for silu, up in (node.inputs, node.inputs[::-1]):
            gate, product = _silu_of(silu), up.producer()
            if gate is None or product is None or product.op_type != "MatMul" or product.inputs[1].const_value is None:
                continue
            size = math.gcd(product.inputs[1].shape[-1], GATE_ROW)
            scale = ir.Value(name=f"{node.outputs[0].name}_scale", shape=ir.Shape([size]))
            scale.const_value = ir.tensor(np.full(size, 2.0**root, np.float16), name=scale.name)
            scale.dtype = scale.const_value.dtype
            graph.register_initializer(scale)
            attributes: dict[str, Any] = {"epsilon": 4.0**root, "activation": "silu"}
            joined = ir.node("GatedRMSNorm", [up, scale, gate], attributes, domain="com.microsoft", version=1)
            graph.insert_before(node, joined)
            ir.convenience.replace_all_uses_with(node.outputs[0], joined.outputs[0])
            break
    remove_unused(graph)


def _silu_of(value: Any) -> Any:
    """x where the value is ``x sigmoid(x)``, else None."""
    product = value.producer()
    if product is None or product.op_type != "Mul":
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        sigmoid = gate.producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
            return x
    return None
