"""ONNX artifacts below float32: sizes, what stays float32, the routing held to the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import reuse_graphs
from models import tiny_model
from support import launches

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import artifact
from mom_compile.export.onnx_artifact import _graph
from mom_compile.export.precision import _drop_repeated, _infer_shapes, _router_path, _state_path, lower_precision
from mom_compile.export.products import join_swiglu

PRECISIONS = ("float16", "int8", "int4")
READERS = ("TopK", "LinearAttention")
Maker = Callable[[str], Path]


@pytest.fixture(scope="module")
def model() -> MoMForCausalLM:
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    return tiny_model("mamba2", num_hidden_layers=1, vocab_size=257, eos_token_id=256, **sizes)


@pytest.fixture(scope="module")
def exported(model: MoMForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Precision -> artifact, exported once."""
    folder = tmp_path_factory.mktemp("precision")

    def make(precision: str) -> Path:
        if not (folder / precision).exists():
            # Random weights of 4 bits are 5 to 10 % off, and so are their logits: asked for, and in the manifest.
            tolerance = 0.5 if precision == "int4" else None
            export.to_onnx(model, folder / precision, precision=precision, tolerance=tolerance)
        return folder / precision

    return make


@pytest.mark.parametrize(("name", "limit"), [("decode", 30), ("decode_touched", 34), ("decode_cuda", 27)])
def test_a_token_takes_few_nodes_in_float16(name: str, limit: int) -> None:
    """Each is a kernel to launch; and none may copy a table from the host, as unequal parts do beside a last axis."""
    import onnx_ir as ir
    from onnx import numpy_helper

    model = tiny_model("gated_delta", num_hidden_layers=1)
    graph = ir.to_proto(lower_precision(_graph(model, "onnxruntime", name), "float16")).graph
    operators = launches(graph)
    assert operators.count("Concat") == 0, sorted(operators)
    assert len(operators) <= limit + 4, sorted(operators)
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Split" and len(node.input) > 1:
            assert len(node.output) == 3 or len(set(constants[node.input[1]])) == 1, node


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_gated_product_of_float16_is_one_node(size: float) -> None:
    """GatedRMSNorm with its norm switched off: as near to the product as float16 is, small or large."""
    import onnx_ir as ir
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x, gate, up = (rng.standard_normal(shape).astype(np.float16) for shape in ((3, 16), (16, 48), (16, 48)))
    up = (up * size).astype(np.float16)
    edges = [("MatMul", ["x", "gate"], "a"), ("MatMul", ["x", "up"], "b"), ("Sigmoid", ["a"], "s")]
    edges += [("Mul", ["a", "s"], "silu"), ("Mul", ["silu", "b"], "y"), ("Neg", ["y"], "o")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [3, n]) for name, n in (("x", 16), ("o", 48))]
    weights = [numpy_helper.from_array(gate, "gate"), numpy_helper.from_array(up, "up")]
    nodes = [helper.make_node(operator, inputs, [output]) for operator, inputs, output in edges]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], weights), opset_imports=opsets, ir_version=10
    )
    model = ir.from_proto(proto)
    join_swiglu(model.graph)
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "GatedRMSNorm", "Neg"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    a, b = (x.astype(np.float64) @ weight.astype(np.float64) for weight in (gate, up))
    expected = -a / (1 + np.exp(-a)) * b
    actual = session.run(None, {"x": x})[0].astype(np.float64)
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("precision", [pytest.param("float16", marks=pytest.mark.slow), *PRECISIONS[1:]])
def test_parity_and_size(precision: str, model: MoMForCausalLM, exported: Maker) -> None:
    folder = exported(precision)
    manifest = artifact.read_manifest(folder)
    assert manifest["precision"] == precision and manifest["parity"]["passed"]
    checks = {check["name"]: check for check in manifest["parity"]["checks"]}
    assert checks["prefill logits, the model's routing forced in"]["error"] > 1e-4  # something was rounded
    assert "64 decode steps with the same routing" in checks
    assert manifest["tolerance"] == (0.5 if precision == "int4" else 0.02)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    fixed = 4 * model.model.embeddings.weight.numel()  # weight-only quantization leaves the embedding alone
    share = {"float16": 0.5, "int8": 0.35, "int4": 0.3}[precision]
    size = (folder / "weights.bin").stat().st_size
    assert size < (weights * share if precision == "float16" else fixed + (weights - fixed) * share) + 64 * 1024


@pytest.mark.parametrize("precision", [pytest.param("float16", marks=pytest.mark.slow), *PRECISIONS[1:]])
def test_the_router_stays_float32(precision: str, exported: Maker) -> None:
    import onnx

    for name in ("prefill.onnx", "decode.onnx", "decode_touched.onnx", "prefill_forced.onnx"):
        graph = onnx.load(str(exported(precision) / name)).graph
        path = set(_router_path(graph))
        projections = [node for node in graph.node if node.name in path and node.op_type in ("MatMul", "Gemm")]
        weights = {tensor.name: tensor for tensor in graph.initializer}
        behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
        found = [weights[behind.get(node.input[1], node.input[1])] for node in projections]
        assert len(found) == 1 and found[0].data_type == onnx.TensorProto.FLOAT
        assert "Softplus" in {node.op_type for node in graph.node if node.name in path}
        half = {n.output[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT16}
        producer = {output: node for node in graph.node for output in node.output}
        pending = [node.input[0 if node.op_type == "TopK" else 4] for node in graph.node if node.op_type in READERS]
        pending += [node.input[0] for node in graph.node if "router_indices.0" in node.input[1:2]]
        while pending:  # back from the choice and from the log decay to the projection
            value = pending.pop()
            source = producer.get(value)
            # A mask of given choices may be float16: it is 0 or 1, and nothing that the projection computed.
            assert value not in half or (source is not None and source.name not in path), value
            if source is not None and source not in projections and source.op_type != "Shape":
                pending += source.input
        quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert bool(quantized) == precision.startswith("int")
        for value in (*graph.input[1:], *graph.output):
            assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)


@pytest.mark.slow
def test_a_state_never_passes_through_float16(exported: Maker) -> None:
    import onnx

    for name in ("decode.onnx", "decode_touched.onnx"):
        graph = onnx.load(str(exported("float16") / name), load_external_data=False).graph
        path = set(_state_path(graph))
        state = [node for node in graph.node if node.name in path]
        assert {"CausalConvWithState", "LinearAttention"} <= {node.op_type for node in state}
        assert not any(node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT for node in state)
        # To float32: the router's input, q with k and v (or each), logits. To float16: what the memories gave.
        assert sum(node.op_type == "Cast" for node in graph.node) <= 5


def test_a_state_of_the_model_goes_on(model: MoMForCausalLM, exported: Maker) -> None:
    import torch

    ids = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits[:, 30:]
        state = model(ids[:, :30]).state
    logits, _ = export.load(exported("int8"))(ids[:, 30:], state)
    assert np.linalg.norm(logits - expected.numpy()) < 0.05 * float(expected.norm())


def test_shapes_are_inferred_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than 2 GB of them the graph cannot be one message."""
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Reshape", ["y", "shape"], ["z"])]
    x, o = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 16]) for name in "xo")
    x.type.tensor_type.shape.dim[0].dim_value = 4
    weights = {"w": np.ones((16, 32), np.float32), "shape": np.array([8, 16])}
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    nodes.append(helper.make_node("Neg", ["z"], ["o"]))
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [o], tensors))
    infer, sizes = shape_inference.infer_shapes, []

    def note(model: Any) -> Any:
        sizes.append(model.ByteSize())
        return infer(model)

    monkeypatch.setattr(shape_inference, "infer_shapes", note)
    _infer_shapes(proto)
    assert sizes[0] < weights["w"].nbytes < proto.ByteSize()
    types = {value.name: value.type.tensor_type for value in proto.graph.value_info}
    found = {name: [axis.dim_value for axis in types[name].shape.dim] for name in "yz"}
    assert found == {"y": [4, 32], "z": [8, 16]}


def test_one_cast_of_a_value() -> None:
    """onnxruntime's float16 tool up to 1.31 casts a value once for every reader that stays float32."""
    from onnx import helper

    casts = [helper.make_node("Cast", ["x"], ["x_cast"], to=1, name=f"cast_{index}") for index in range(2)]
    graph = helper.make_graph([*casts, helper.make_node("Add", ["x_cast", "x_cast"], ["y"])], "g", [], [])
    _drop_repeated(graph)
    assert [node.op_type for node in graph.node] == ["Cast", "Add"]


def test_a_given_routing(model: MoMForCausalLM, exported: Maker) -> None:
    runner = export.load(exported("int8"))
    assert isinstance(runner, export.OnnxRunner)
    ids = np.arange(6).reshape(2, 3)
    chosen = np.array([1, 3])[None, None].repeat(2, 0).repeat(3, 1)
    _, state = runner.run_forced(ids, [chosen])
    used = np.abs(state[0]["recurrent_state"]).sum((0, 2, 3, 4)) > 0
    assert used.tolist() == [False, True, False, True, True]
    with pytest.raises(
        ValueError, match=r"router_indices must be \[B, T, k\] = \(2, 3, 2\) for each of 1 layers, got \(2, 3, 1\)"
    ):
        runner.run_forced(ids, [chosen[..., :1]])


def test_the_keys_and_values_have_4_bits_in_int4(exported: Maker) -> None:
    import onnx

    levels: set[bytes] = set()
    for name in ("prefill.onnx", "decode.onnx", "decode_touched.onnx", "prefill_forced.onnx"):
        graph = onnx.load(str(exported("int4") / name)).graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        attributes = [{item.name: item.i for item in node.attribute} for node in nodes]
        bits = sorted((found["bits"], found["N"]) for found in attributes)
        # 5 memories with 2 heads of 32 for k and for v; q, output gate, o, down; gate, up; the logits.
        assert bits == [(4, 5 * 128), (8, 64), (8, 64), (8, 64), (8, 64), (8, 128), (8, 128), (8, 257)]
        levels.update(weights[n.input[1]].raw_data for n, a in zip(nodes, attributes, strict=True) if a["bits"] == 4)
    assert len(levels) == 1  # the graphs read the same levels


def test_messages(
    model: MoMForCausalLM,
    exported: Maker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, float16, int8, int4, got 'int2'"):
        export.to_onnx(model, tmp_path / "x", precision="int2")
    with pytest.raises(ValueError, match="precision must be float32 for target portable, got 'int8'"):
        export.to_onnx(model, tmp_path / "x", target="portable", precision="int8")
    model.save_pretrained(tmp_path / "checkpoint")
    command = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "x"), "--to", "pt2", "--precision", "int8"]
    assert main(command) == 2
    wanted = "must go with --to onnxruntime or --to onnxruntime-cuda or --to tensorrt, got --to pt2; leave it out"
    assert f"--precision {wanted}" in capsys.readouterr().err
    reuse_graphs(monkeypatch, exported("int4"))
    with pytest.raises(ValueError, match=r"agree with the model to 0\.02(.|\n)*routing forced in .*FAILED"):
        export.to_onnx(model, tmp_path / "x", precision="int4")  # random weights: not without being asked for
    assert not (tmp_path / "x").exists()
