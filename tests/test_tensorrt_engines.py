"""Engines built by TensorRT for RTX, with no GPU (make test-tensorrt). What runs are the graphs, in onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import tiny_model
from onnx import TensorProto, helper

from mom_compile import MoMConfig, MoMForCausalLM, export
from mom_compile.demo import demo_model
from mom_compile.export._tensorrt import require_tensorrt
from mom_compile.export.artifact import read_manifest
from mom_compile.export.runner import load
from mom_compile.export.tensorrt_artifact import with_precision
from mom_compile.export.tensorrt_engines import build_engine
from mom_compile.ops import route
from mom_compile.report import relative

pytestmark = pytest.mark.tensorrt
tensorrt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT for RTX: make test-tensorrt installs it")

DATA = Path(__file__).parent / "data"
GPUS = (86, 89, 120)


def test_the_kept_checkpoint_is_the_demonstrations() -> None:
    """What a run of ``make demo`` left, in float16. When the demonstration changes: run it, and keep its model anew."""
    assert MoMConfig.from_dict(json.loads((DATA / "demo" / "config.json").read_text())) == demo_model()


def _combination(source: str, precision: str, *marks: pytest.MarkDecorator) -> Any:
    group = pytest.mark.xdist_group(source + precision)
    return pytest.param((source, precision), id=f"{source}-{precision}", marks=(group, *marks))


@pytest.fixture(
    scope="module",
    params=[
        _combination("demo", "float16"),
        _combination("fla-mom-tiny", "float32"),
        _combination("demo", "float32", pytest.mark.slow),  # each takes minutes
        _combination("fla-mom-tiny", "float16", pytest.mark.slow),
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact: its engines built for RTX 30, 40 and 50, its graphs verified."""
    source, precision = request.param
    folder = tmp_path_factory.mktemp("engines") / "artifact"
    model = MoMForCausalLM.from_pretrained(DATA / source).float()
    report = export.to_tensorrt(model, folder, precision=precision, compute_capabilities=GPUS)
    assert report.passed, str(report)
    return folder


def test_engines(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest["compute_capabilities"] == list(GPUS) and manifest["parity"]["passed"]
    assert manifest["versions"]["tensorrt-rtx"] == require_tensorrt().__version__
    for name in ("prefill", "decode"):
        engine = manifest["engines"][name]
        assert engine["bytes"] == (exported / engine["file"]).stat().st_size > 100_000
        assert engine["build_seconds"] > 0


def test_each_gpu_by_itself(exported: Path, tmp_path: Path) -> None:
    """One of them in float16, the others in float32."""
    manifest = read_manifest(exported)
    shapes = manifest["engines"]["decode"]["shapes"]
    for gpu in GPUS[1:2] if manifest["precision"] == "float16" else GPUS[::2]:
        built = build_engine(exported / "decode.onnx", tmp_path / f"sm{gpu}.engine", shapes, [gpu])
        assert built["bytes"] == (tmp_path / f"sm{gpu}.engine").stat().st_size > 100_000


def test_the_whole_graph_is_one_partition(exported: Path) -> None:
    """What the ONNX Runtime provider asks the same parser before it takes nodes: none is left to another provider."""
    for file in read_manifest(exported)["graphs"].values():
        builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, tensorrt.Logger(tensorrt.Logger.ERROR))
        path = exported / file
        assert parser.supports_model_v2(path.read_bytes(), str(path)), file
        assert parser.num_subgraphs == 1 and parser.is_subgraph_supported(0)
        count = len(onnx.load(str(path), load_external_data=False).graph.node)
        assert sorted(parser.get_subgraph_nodes(0)) == list(range(count))


def test_bfloat16_and_the_touched_decode(tmp_path: Path) -> None:
    model = tiny_model("mamba2", num_memories=8, topk=1, num_hidden_layers=1)
    report = export.to_tensorrt(model, tmp_path / "x", precision="bfloat16", compute_capabilities=[89])
    assert report.passed, str(report)
    manifest = read_manifest(tmp_path / "x")
    assert set(manifest["engines"]) == {"prefill", "decode_touched"}
    weights = onnx.load(str(tmp_path / "x" / "decode.onnx"), load_external_data=False).graph.initializer
    assert TensorProto.BFLOAT16 in {tensor.data_type for tensor in weights}
    # The graph adds nothing to the rounding of the weights, where its activations are widened for the CPU.
    rounded = with_precision(model, "bfloat16").float()
    ids = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        chosen = [route(logits.flatten(0, 1), 1)[1].view(2, 70, 1) for logits in model(ids).router_logits]
        expected = rounded(ids, router_indices=chosen).logits
    runner: Any = load(tmp_path / "x", providers=["CPUExecutionProvider"])
    logits, _ = runner.run_forced(ids.numpy(), [indices.numpy() for indices in chosen])
    assert relative(logits, expected.numpy()) < 1e-4


def test_a_graph_that_tensorrt_does_not_take(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Unique", ["x"], ["y"], name="only")
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, ["n"])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "x.onnx"))
    with pytest.raises(
        ValueError, match=r"x.onnx must parse in TensorRT for RTX .*, got Unique only: .*export it with --to"
    ):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.engine", {"x": [[2], [2], [2]]}, [89])
    with pytest.raises(ValueError, match="compute_capabilities must be among 80, .*, got 90"):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.engine", {"x": [[2], [2], [2]]}, [90])
    assert not (tmp_path / "x.engine").exists()


def test_the_libraries_have_their_unversioned_names() -> None:
    """The parser opens libtensorrt_rtx.so by that name, beside itself; the wheel has libtensorrt_rtx.so.1 alone."""
    code = (
        "import tempfile, pathlib\n"
        "from mom_compile.export._tensorrt import require_tensorrt\n"
        "before = set(pathlib.Path(tempfile.gettempdir()).glob('mom-compile-tensorrt-*'))\n"
        "require_tensorrt()\n"
        "links, = set(pathlib.Path(tempfile.gettempdir()).glob('mom-compile-tensorrt-*')) - before\n"
        "print(links, *sorted(path.name for path in links.iterdir()))\n"
    )
    words = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    folder, names = Path(words[0]), words[1:]
    assert {"libtensorrt_rtx.so", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so"} <= set(names)
    assert not folder.exists()  # removed at the end
