"""Chains of Reshape, Squeeze and Unsqueeze: a runtime spends a step on each, and copies what one gives as an output."""

from __future__ import annotations

from typing import Any

import numpy as np

VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def merge_views(graph: Any) -> None:
    """Each chain as one Reshape, or as nothing where it ends in the shape that it began with, in an onnx_ir graph."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in VIEWS:
            continue
        old, source = node.outputs[0], _source(node)
        symbolic = [size for size in old.shape if not isinstance(size, int)]
        if list(old.shape) == list(source.shape) and not (old.is_graph_output() and source.producer() is None):
            name = old.name
            ir.convenience.replace_all_uses_with(old, source, replace_graph_outputs=True)
            if source.is_graph_output():
                old.name, source.name = f"{name}_view", name
        elif source is not node.inputs[0] and len(symbolic) <= 1:
            sizes = np.array([size if isinstance(size, int) else -1 for size in old.shape])
            shape = ir.Value(
                name=f"{old.name}_shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(sizes.shape)
            )
            shape.const_value = ir.tensor(sizes, name=shape.name)
            graph.register_initializer(shape)
            view = ir.Node("", "Reshape", [source, shape], outputs=[ir.Value(shape=old.shape, type=old.type)])
            graph.insert_before(node, view)
            name = old.name
            ir.convenience.replace_all_uses_with(old, view.outputs[0], replace_graph_outputs=True)
            old.name, view.outputs[0].name = f"{name}_view", name
    remove_unused(graph)


def remove_unused(graph: Any) -> None:
    """Drop the nodes and weights that nothing reads."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _source(node: Any) -> Any:
    """What the chain that ends in this node begins with."""
    source = node.inputs[0]
    while source.producer() is not None and source.producer().op_type in VIEWS:
        source = source.producer().inputs[0]
    return source
