"""Rounding to 4 bits: on the grid that the graph reads, better for products than rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest

from mom_compile.export.calibration import Rounded, weight_key
from mom_compile.export.gptq import gptq
from mom_compile.export.precision import _place


def _inputs(rows: int, samples: int = 400) -> np.ndarray:
    """Correlated, as the inputs of a projection are."""
    generator = np.random.default_rng(1)
    return generator.standard_normal((samples, 8)) @ generator.standard_normal((8, rows)) + 0.3 * (
        generator.standard_normal((samples, rows))
    )


def _value(rounded: Rounded, block_size: int = 16) -> np.ndarray:
    rows = len(rounded.levels)
    scales, zeros = (part.repeat(block_size, 0)[:rows] for part in (rounded.scales, rounded.zero_points))
    return (rounded.levels.astype(np.float64) - zeros) * scales


@pytest.mark.parametrize("rows", [16, 40, 300])
def test_products_are_kept_better_than_by_the_nearest_level(rows: int) -> None:
    x, weight = _inputs(rows), np.random.default_rng(0).standard_normal((rows, 24)).astype(np.float32)
    rounded = Rounded(*gptq(weight, x.T @ x, 16))
    nearest = Rounded(*gptq(weight, np.eye(rows), 16))  # nothing is correlated: no row can make up for another
    errors = [np.linalg.norm(x @ (_value(value) - weight)) for value in (rounded, nearest)]
    assert errors[0] < 0.75 * errors[1]
    assert rounded.levels.max() <= 15 and rounded.zero_points.max() <= 15
    half = nearest.scales.repeat(16, 0)[:rows] / 2
    assert (np.abs(_value(nearest) - weight) <= 1.01 * half + half * (nearest.levels % 15 == 0)).all()


def test_what_the_grid_has_stays(rows: int = 32) -> None:
    levels = np.random.default_rng(2).integers(0, 16, (rows, 5))
    levels[::16], levels[1::16] = 0, 15
    weight = (levels - 7.0) * 0.25
    x = _inputs(rows)
    assert np.array_equal(_value(Rounded(*gptq(weight, x.T @ x, 16))), weight)


def test_inputs_that_were_never_seen() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 4))
    value = _value(Rounded(*gptq(weight, np.zeros((32, 32)), 16)))
    assert np.abs(value - weight).max() < 0.4
    assert np.array_equal(_value(Rounded(*gptq(0 * weight, np.zeros((32, 32)), 16))), 0 * weight)


@pytest.mark.parametrize("rows", [32, 40, 24])
def test_the_graph_computes_with_the_levels(rows: int) -> None:
    """Packed as MatMulNBits reads it, rows that fill no block and an odd number of blocks included."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    helper, weight = onnx.helper, np.random.default_rng(0).standard_normal((rows, 24)).astype(np.float32)
    x = _inputs(rows).astype(np.float32)
    rounded = Rounded(*gptq(weight, (x.T @ x).astype(np.float64), 16))
    values = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", rows), ("y", 24))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="p")], "g", values[:1], values[1:])
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    proto = _place(helper.make_model(graph, opset_imports=opsets, ir_version=10), {weight_key(weight): rounded})
    assert [node.op_type for node in proto.graph.node] == ["MatMulNBits"]
    (y,) = runtime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    expected = x @ _value(rounded)
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(y - x @ weight) > 1e-3 * np.linalg.norm(expected)
