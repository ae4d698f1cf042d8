"""The graphs for TensorRT, in onnxruntime; the runner, over a stand-in for TensorRT that runs the graphs on the CPU.

Engines are built in test_tensorrt_engines.py, where TensorRT for RTX is installed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import VARIANTS, tiny_model, tokens
from onnx import TensorProto, helper
from support import KINDS, relative, rule_inputs
from torch import Tensor, nn

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import (
    _tensorrt,
    _tensorrt_provider,
    budget,
    jetpack,
    onnx_runner,
    tensorrt_artifact,
    tensorrt_runner,
)
from mom_compile.export._tensorrt_provider import PROVIDER
from mom_compile.export.artifact import read_manifest
from mom_compile.export.lowerings import chunked
from mom_compile.export.onnx_artifact import convert, quiet, save_graphs
from mom_compile.export.program import DYNAMIC_BATCH, DYNAMIC_LENGTH, trace
from mom_compile.export.tensorrt_shapes import ShapeRanges, trtexec_shapes
from mom_compile.ops import RULES
from mom_compile.ops.memory_rule import recurrence_reference

# One process for all of them: they share their artifacts.
pytestmark = [pytest.mark.tensorrt, pytest.mark.xdist_group("graphs")]

VERSION = "1.7.1.116"


# ---- one token, all memories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_dense_form_equals_the_step_form(rule: str, variant: str) -> None:
    model = tiny_model(rule, num_hidden_layers=1, **VARIANTS[variant])
    token = tokens(3, 1)
    with torch.no_grad():
        state = model(tokens(3, 40)).state
        expected, out = (model(token, state=state, form=form) for form in ("step", "dense"))
    assert relative(out.logits, expected.logits) < 1e-6
    for name, value in expected.state[0].items():
        assert relative(out.state[0][name], value) < 1e-6, name
        untouched = (value == state[0][name]).flatten(2).all(2)  # bit for bit
        assert torch.equal(out.state[0][name][untouched], state[0][name][untouched]), name


def test_the_dense_form_takes_one_token() -> None:
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(
        ValueError, match="x must have one token, a state and no mask for form dense, got 2 tokens, a state"
    ):
        model(tokens(1, 2), state=model.init_state(1), form="dense")


# ---- the chunked rule as a graph, on hostile inputs ------------------------------------------------------------------


class _Chunked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(RULES["gated_delta"], q, k, v, g, beta, state, 0.25)


@pytest.fixture(scope="module", params=["float32", "float16"])
def chunked_session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The gated delta rule for any length, as prefill holds it."""
    import onnxruntime

    dtype = getattr(torch, request.param)
    q, k, v, g, beta = rule_inputs("gated_delta", (2, 70), heads=4, dtype=dtype)
    inputs = (q, k, v, g, beta, torch.zeros(2, 4, 16, 8))
    names = ("q", "k", "v", "g", "beta", "state")
    token_axes = {0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH}
    with quiet():
        program = trace(_Chunked(), inputs, (*[token_axes] * 5, {0: DYNAMIC_BATCH}))
    axes = {**dict.fromkeys(names[:5], "length"), "state": None, "o": "length", "final_state": None}
    graph = convert(program, {n: axes[n] for n in names}, {n: axes[n] for n in ("o", "final_state")})
    folder = tmp_path_factory.mktemp("chunked")
    save_graphs(folder, [("rule", "rule.onnx", lambda: graph)])
    return request.param, onnxruntime.InferenceSession(str(folder / "rule.onnx"))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_stay_finite_and_right_in_the_exported_prefill(
    kind: str, chunked_session: tuple[str, Any]
) -> None:
    """Correlated keys with beta near 1, strong decay: where a Neumann doubling gives 1e9 or NaN."""
    precision, session = chunked_session
    dtype = getattr(torch, precision)
    for length in (1, 63, 130):
        q, k, v, g, beta = rule_inputs("gated_delta", (2, length), heads=4, kind=kind, dtype=dtype)
        assert g is not None and beta is not None
        state = torch.randn(2, 4, 16, 8)
        feeds = dict(zip(("q", "k", "v", "g", "beta", "state"), (q, k, v, g, beta, state), strict=True))
        o, final = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        expected, expected_final = recurrence_reference(q.float(), k.float(), v.float(), g, beta, 0.25, state)
        assert np.isfinite(o).all() and np.isfinite(final).all()
        tolerance = 1e-4 if precision == "float32" else 2e-2
        assert relative(torch.from_numpy(o).float(), expected) < tolerance, length
        assert relative(torch.from_numpy(final), expected_final) < tolerance, length


# ---- artifacts, their engines replaced -------------------------------------------------------------------------------


def _stand_in_engine(onnx_file: Path, engine_file: Path, shapes: Any, capabilities: Sequence[int]) -> dict[str, Any]:
    engine_file.write_text(onnx_file.name)
    return {"build_seconds": 0.0, "bytes": engine_file.stat().st_size}


@pytest.fixture(scope="module", params=["float32-dense", "float16-touched"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    """A model and its artifact: masked decode in float32; decode of the selected memories alone in float16."""
    precision, decode = request.param.split("-")
    sizes: dict[str, Any] = {"num_memories": 8, "topk": 1} if decode == "touched" else {}
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256, **sizes)
    folder = tmp_path_factory.mktemp("tensorrt") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_artifact, "build_engine", _stand_in_engine)
        patch.setattr(tensorrt_artifact, "require_tensorrt", lambda: SimpleNamespace(__version__=VERSION))
        export.to_tensorrt(model, folder, precision=precision, batch=(1, 1, 4), length=(1, 32, 48))
    return model, folder


def test_the_manifest_and_the_ladder(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    manifest = read_manifest(folder)
    decode = "decode_touched" if "touched" in str(manifest["engines"]) else "decode"
    assert set(manifest["engines"]) == {"prefill", decode}
    shapes = manifest["engines"]["prefill"]["shapes"]
    memories = model.config.total_memories
    assert shapes["input_ids"] == [[1, 1], [1, 32], [4, 48]]
    assert shapes["past_key_values.0.recurrent_state"] == [[n, memories * 2, 8, 8] for n in (1, 1, 4)]
    assert manifest["compute_capabilities"] == [86, 89, 120] and manifest["versions"]["tensorrt-rtx"] == VERSION
    assert manifest["parity"]["passed"]
    names = {check["name"] for check in manifest["parity"]["checks"]}
    forced = "prefill logits, the model's routing forced in"
    assert (forced if manifest["precision"] == "float16" else "prefill states") in names
    operators = manifest["io"]["decode"]["operators"]
    assert operators["Gather"] == 1  # the embedding
    assert not {"GatherND", "GatherElements", "ScatterND", "ScatterElements", "CumSum", "Loop"} & set(operators)
    assert "Scan" in manifest["io"]["prefill"]["operators"] and "Loop" not in manifest["io"]["prefill"]["operators"]
    assert {graph["opsets"]["ai.onnx"] for graph in manifest["io"].values()} == {20}


def test_the_router_and_the_decay_stay_float32(exported: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = exported
    for name in ("prefill", "decode"):
        model = onnx.shape_inference.infer_shapes(onnx.load(str(folder / f"{name}.onnx"), load_external_data=False))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in ("TopK", "Softplus", "Exp"):
                assert types[node.input[0]] == TensorProto.FLOAT, node.op_type
        weights = [t for t in model.graph.initializer if t.dims and t.dims[-1] > 1 and t.data_type == TensorProto.FLOAT]
        half = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16]
        assert weights and bool(half) == (read_manifest(folder)["precision"] == "float16")


def test_build_script(exported: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = exported
    script = (folder / "build.sh").read_text()
    line = next(line for line in script.splitlines() if "--onnx=prefill.onnx" in line)
    assert "--stronglyTyped --noTF32" in line and "--minShapes=input_ids:1x1,past_key_values.0.conv_state:1x" in line
    assert "--optShapes=input_ids:1x32," in line and "--maxShapes=input_ids:4x48," in line
    assert "enqueueV3" in (folder / "tensorrt_runner.cpp").read_text()


class _Context:
    """An execution context that computes by onnxruntime on host memory."""

    def __init__(self, graph: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(graph))
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return name in {value.name for value in self.session.get_inputs()}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {value.name: self._array(value, self.shapes[value.name]).copy() for value in self.session.get_inputs()}
        for value, result in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            self._array(value, result.shape)[...] = result
        return True

    def _array(self, value: Any, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype({"tensor(int64)": np.int64, "tensor(float)": np.float32}[value.type])
        size = int(np.prod(shape)) * dtype.itemsize
        return (
            np.ctypeslib.as_array((ctypes.c_byte * size).from_address(self.addresses[value.name]))
            .view(dtype)
            .reshape(shape)
        )


def _stand_in(folder: Path, version: str = VERSION, opens: bool = True) -> Any:
    def deserialize(data: bytes) -> Any:
        return (
            SimpleNamespace(
                create_runtime_config=SimpleNamespace,
                create_execution_context=lambda config: _Context(folder / data.decode()),
            )
            if opens
            else None
        )

    return SimpleNamespace(
        __version__=version,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, exported: tuple[MoMForCausalLM, Path]) -> Path:
    monkeypatch.setattr(tensorrt_runner, "require_tensorrt", lambda: _stand_in(exported[1]))
    monkeypatch.setattr(tensorrt_runner.TensorRTRunner, "_check_device", lambda self: None)
    monkeypatch.setattr(tensorrt_runner.TensorRTRunner, "_stream", lambda self: 0)
    return exported[1]


def test_the_runner(exported: tuple[MoMForCausalLM, Path], on_the_cpu: Path) -> None:
    """Prefill in pieces of the profile, decode steps, a state that goes on in the model; what is passed in is kept."""
    model, folder = exported
    runner = export.load(folder, device="cpu")
    tolerance = 1e-4 if runner.manifest["precision"] == "float32" else 2e-2
    ids = tokens(2, 130, 257)
    with torch.no_grad():
        whole = model(ids)
    logits, state = runner(ids[:, :100])  # 48 at a time
    before = [{name: value.clone() for name, value in layer.items()} for layer in state]
    assert relative(logits, whole.logits[:, :100]) < tolerance
    step = runner.decode_loop(state, 2)
    pieces = [torch.from_numpy(step(ids[:, t].numpy()).copy()) for t in range(100, 110)]
    assert relative(torch.stack(pieces, 1), whole.logits[:, 100:110]) < tolerance
    one, after_one = runner(ids[:, 100:101], state)
    assert relative(one, whole.logits[:, 100:101]) < tolerance
    assert all(torch.equal(state[0][name], value) for name, value in before[0].items())
    with torch.no_grad():
        rest = model(ids[:, 101:], state=after_one)
    assert relative(rest.logits, whole.logits[:, 101:]) < tolerance
    assert sum(1 for _ in runner.generate(ids[:, :60].numpy(), 5, eos_token_id=-1)) == 5


def test_runner_messages(
    exported: tuple[MoMForCausalLM, Path], on_the_cpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = exported
    runner = export.load(folder, device="cpu")
    with pytest.raises(ValueError, match=r"the batch must lie in \[1, 4\], the shape profile of prefill.engine, got 5"):
        runner(tokens(5, 3))
    with pytest.raises(ValueError, match=r"got 5; export again with --batch 1 1 5, or pass fewer rows"):
        runner.decode_loop(runner.init_state(5), 5)
    monkeypatch.setattr(tensorrt_runner, "require_tensorrt", lambda: _stand_in(folder, "1.8.0.1"))
    with pytest.raises(
        ValueError, match=rf"must be run by TensorRT for RTX {VERSION}, which built it, got 1.8.0.1; run: pip"
    ):
        export.load(folder, device="cpu")(tokens(1, 2))
    monkeypatch.setattr(tensorrt_runner, "require_tensorrt", lambda: _stand_in(folder, opens=False))
    with pytest.raises(ValueError, match=rf"must open on this GPU with its driver, got one that TensorRT {VERSION}"):
        export.load(folder, device="cpu")(tokens(1, 2))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "prefill.engine").unlink()
    with pytest.raises(ValueError, match="prefill.engine must lie in"):
        export.load(tmp_path / "copy", device="cpu")


def test_without_a_fitting_gpu(exported: tuple[MoMForCausalLM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = exported
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"must be a CUDA GPU of compute capability 8.6, 8.9, 12.0 .* no GPU; load\("
        ):
            export.load(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(
        ValueError, match=r"capability 8.6, 8.9, 12.0, .* got 9.0; export with --compute-capability 90, or"
    ):
        export.load(folder)
    logits, _ = export.load(folder, providers=["CPUExecutionProvider"])(tokens(1, 3).numpy())
    assert logits.shape == (1, 3, 257)


def _onnxruntime(devices: list[Any], fails: bool = False) -> Any:
    """onnxruntime with a TensorRT-RTX provider that computes on the CPU."""
    import onnxruntime

    class Session:
        def __init__(self, model: str, options: Any) -> None:
            assert options.config["session.disable_cpu_ep_fallback"] == "1" and options.devices == devices[:1]
            assert options.settings["nv_profile_max_shapes"].startswith("input_ids:4x")
            self.inner = onnxruntime.InferenceSession(model)
            self.get_inputs, self.io_binding = self.inner.get_inputs, self.inner.io_binding
            self.run_with_iobinding = self.inner.run_with_iobinding

    class Options:
        def __init__(self) -> None:
            self.config: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.config[key] = value

        def add_provider_for_devices(self, devices: list[Any], settings: dict[str, str]) -> None:
            self.devices, self.settings = devices, settings

    registered: list[str] = []

    def register(name: str, path: str) -> None:
        if fails:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        registered.append(name)

    return SimpleNamespace(
        __version__="1.32.0",
        SessionOptions=Options,
        InferenceSession=Session,
        OrtValue=onnxruntime.OrtValue,
        get_ep_devices=lambda: devices if registered else [],
        register_execution_provider_library=register,
    )


def test_the_provider_of_onnxruntime(exported: tuple[MoMForCausalLM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = exported
    plugin = SimpleNamespace(get_ep_name=lambda: PROVIDER, get_library_path=lambda: "plugin.so")
    monkeypatch.setattr(_tensorrt_provider, "require", lambda module, extra: plugin)
    device = SimpleNamespace(ep_name=PROVIDER)
    monkeypatch.setattr(onnx_runner, "require_onnxruntime", lambda: _onnxruntime([device]))
    ids = tokens(2, 20, 257)
    logits, _ = export.load(folder, providers=[PROVIDER])(ids.numpy())
    with torch.no_grad():
        assert relative(torch.from_numpy(logits), model(ids).logits) < 2e-2
    monkeypatch.setattr(onnx_runner, "require_onnxruntime", lambda: _onnxruntime([]))
    with pytest.raises(ValueError, match=f"{PROVIDER} must find an RTX GPU, got none that it takes; pass providers="):
        export.load(folder, providers=[PROVIDER])(ids.numpy())
    monkeypatch.setattr(onnx_runner, "require_onnxruntime", lambda: _onnxruntime([device], fails=True))
    with pytest.raises(
        ImportError, match="onnxruntime-ep-nv-tensorrt-rtx must load, got libcuda.so.1.* needs an NVIDIA"
    ):
        export.load(folder, providers=[PROVIDER])(ids.numpy())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (87, "Jetson Orin takes the TensorRT of its JetPack"),
        (90, "H200 takes PyTorch"),
        (75, "float16 alone"),
        (8, "89 for 8.9"),
    ],
)
def test_compute_capabilities(value: int, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"must be among 80, 86, 89, 120, 121 .*, got {value}; .*{advice}"):
        export.to_tensorrt(tiny_model(), tmp_path / "x", compute_capabilities=(86, value))
    assert not (tmp_path / "x").exists()


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="compute_capabilities must name at least one of 80, .*, got none"):
        export.to_tensorrt(model, tmp_path / "x", compute_capabilities=())
    with pytest.raises(ValueError, match=r"compute_capabilities must be None for profile jetpack6, got \(86,\); its"):
        export.to_tensorrt(model, tmp_path / "x", profile="jetpack6", compute_capabilities=[86])
    with pytest.raises(ValueError, match="profile must be one of rtx, jetpack6, got 'jetpack5'"):
        export.to_tensorrt(model, tmp_path / "x", profile="jetpack5")
    with pytest.raises(
        ValueError, match="one of float32, float16, bfloat16 for profile rtx, got 'int4'; .* use --profile jetpack6"
    ):
        export.to_tensorrt(model, tmp_path / "x", precision="int4")
    with pytest.raises(ValueError, match="bfloat16, int4 for profile jetpack6, got 'int8'; .* use --to onnxruntime"):
        export.to_tensorrt(model, tmp_path / "x", precision="int8", profile="jetpack6")
    with pytest.raises(ValueError, match=r"batch must be three ascending numbers of at least 1 .*, got \(4, 1, 8\)"):
        export.to_tensorrt(model, tmp_path / "x", batch=(4, 1, 8))
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "x"), "--compute-capability", "89"]) == 2
    wanted = "must go with --to tensorrt or --to kernels or --to onnxruntime-cuda, got --to onnxruntime"
    assert f"--compute-capability {wanted}" in capsys.readouterr().err


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    genuine = _tensorrt.require_tensorrt.__wrapped__
    monkeypatch.setattr(_tensorrt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'must be installed to build or run engines, .* pip install "mom-compile\[tensorrt'
    ):
        genuine()
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(
        _tensorrt.importlib.util, "find_spec", lambda name: found if name == "tensorrt_rtx_libs" else None
    )
    with pytest.raises(ImportError, match=r"must hold libtensorrt_rtx.so.1, got no library; reinstall it"):
        genuine()
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"not a library")
    with pytest.raises(
        ImportError, match=r"libtensorrt_rtx.so must load from .*, got .*; reinstall it: run: pip install"
    ):
        genuine()

    def broken(name: str) -> ModuleType:
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(_tensorrt.importlib.util, "find_spec", lambda name: found if name == "tensorrt_rtx" else None)
    monkeypatch.setattr(_tensorrt.importlib, "import_module", broken)
    with pytest.raises(
        ImportError, match="tensorrt_rtx must find its libraries, got libtensorrt_rtx.so.1: cannot open"
    ):
        genuine()


# ---- Jetson ----------------------------------------------------------------------------------------------------------


def test_jetpack6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4-bit weights, inside the parser's list, through the command line."""
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256, **sizes)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "orin"
    options = [
        "--to",
        "tensorrt",
        "--profile",
        "jetpack6",
        "--precision",
        "int4",
        "--tolerance",
        "0.5",
    ]  # random weights
    assert main(["export", str(tmp_path / "model"), str(folder), *options]) == 0
    manifest = read_manifest(folder)
    assert manifest["profile"] == "jetpack6" and manifest["compute_capabilities"] == [87]
    assert not list(folder.glob("*.engine"))
    assert "/usr/src/tensorrt/bin/trtexec" in (folder / "build.sh").read_text()
    graph = onnx.load(str(folder / "prefill.onnx"), load_external_data=False).graph
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert len(dequantized) == 8  # q, the joint k and v, gate and output projections, three of the MLP, the head
    assert {weights[node.input[0]].data_type for node in dequantized} == {TensorProto.INT4}
    assert {weights[node.input[1]].data_type for node in dequantized} == {TensorProto.FLOAT16}
    floor = manifest["budget"]["floor_ms_per_token"]["Jetson AGX Orin 64GB"]
    assert 0 < floor < 0.1
    capsys.readouterr()
    assert main(["inspect", str(folder), "--budget"]) == 0
    printed = capsys.readouterr().out
    assert "batch in 8 GB" in printed
    assert (
        "engines for compute capability 8.7: prefill.engine, decode.engine; batch 1 to 8, length 1 to 1024" in printed
    )
    with pytest.raises(ValueError, match="device must be a CUDA GPU of compute capability 8.7"):
        export.load(folder, device="cpu")


def _save(path: Path, nodes: list[Any], opset: int = 20) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.INT64, [2])], [value("y", TensorProto.INT64, [2])])
    graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [], [0]))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), str(path))
    return path


def test_what_the_parser_lacks_is_refused(tmp_path: Path) -> None:
    node = helper.make_node
    with pytest.raises(ValueError, match="x.onnx must hold what TensorRT's parser lists, got Unique of ai.onnx"):
        jetpack.check_parser_operators(_save(tmp_path / "x.onnx", [node("Unique", ["x"], ["y"])]))
    with pytest.raises(ValueError, match="got CumSum of INT64; the list: https://github.com/onnx/onnx-tensorrt"):
        jetpack.check_parser_operators(_save(tmp_path / "x.onnx", [node("CumSum", ["x", "axis"], ["y"])]))
    with pytest.raises(ValueError, match="got opset 23 of ai.onnx"):
        jetpack.check_parser_operators(_save(tmp_path / "x.onnx", [node("Identity", ["x"], ["y"])], 23))
    with pytest.raises(ValueError, match="got ReduceSum with computed axes"):
        axes = node("Sub", ["x", "x"], ["a"])
        jetpack.check_parser_operators(_save(tmp_path / "x.onnx", [axes, node("ReduceSum", ["x", "a"], ["y"])]))
    jetpack.check_parser_operators(_save(tmp_path / "x.onnx", [node("Identity", ["x"], ["y"])]))


def test_weights_of_4_bits() -> None:
    weight = torch.randn(128, 6).half().numpy()
    packed, scale = jetpack._int4(weight, 64)
    assert packed.shape == (128 * 6 // 2,) and scale.shape == (2, 6)
    low, high = (packed & 0xF).astype(np.int8), (packed >> 4).astype(np.int8)
    values = np.stack([low, high], 1).reshape(128, 6)
    values = np.where(values > 7, values - 16, values).astype(np.float32)
    error = np.abs(values * scale.astype(np.float32).repeat(64, 0) - weight.astype(np.float32))
    assert (error <= scale.astype(np.float32).repeat(64, 0) * 0.51).all()


HEADERS = os.environ.get("TENSORRT_INCLUDE", "/usr/include/x86_64-linux-gnu")


@pytest.mark.skipif(
    not (Path(HEADERS) / "NvInfer.h").is_file() or shutil.which("g++") is None,
    reason="needs g++ and TensorRT's headers: .ci/tensorrt-headers FOLDER, TENSORRT_INCLUDE=FOLDER",
)
def test_the_runner_in_cpp_compiles(tmp_path: Path) -> None:
    import triton

    source = Path(tensorrt_artifact.__file__).parent / "cpp" / tensorrt_artifact.RUNNER_SOURCE
    cuda = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", HEADERS, "-isystem", str(cuda)]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(tmp_path / "runner.o")], check=True)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_those_of_the_model(variant: str) -> None:
    for rule in RULES:
        for tied in (False, True):
            model = tiny_model(rule, tie_word_embeddings=tied, **VARIANTS[variant])
            assert sum(budget.parameters(model.config).values()) == sum(p.numel() for p in model.parameters())
            state = model.init_state(1)
            assert budget.state_bytes(model.config) == sum(4 * x.numel() for layer in state for x in layer.values())


def test_budget() -> None:
    config = dataclasses.replace(tiny_model().config, hidden_size=1024, num_hidden_layers=24, num_heads=4, head_dim=256)
    assert budget.weight_bytes(config, "float16")["total"] < budget.weight_bytes(config, "float32")["total"]
    fits = [budget.largest_batch(config, "float16", memory) for memory in (1, 8, 16, 64)]
    assert fits[0] == 0 and fits == sorted(fits) and fits[1] < fits[3]
    one, two = (budget.floor_ms(config, "float16", 100.0, batch) for batch in (1, 2))
    assert two - one == pytest.approx(2 * budget.state_bytes(config) / 100e9 * 1e3)


def test_shape_ranges() -> None:
    inputs: list[dict[str, Any]] = [
        {"name": "input_ids", "shape": ["batch", "sequence"]},
        {"name": "past", "shape": ["batch", 10, 4]},
    ]
    shapes = ShapeRanges((1, 2, 3), (1, 5, 9)).shapes(inputs)
    assert shapes == {"input_ids": [[1, 1], [2, 5], [3, 9]], "past": [[1, 10, 4], [2, 10, 4], [3, 10, 4]]}
    assert trtexec_shapes(shapes).split() == [
        "--minShapes=input_ids:1x1,past:1x10x4",
        "--optShapes=input_ids:2x5,past:2x10x4",
        "--maxShapes=input_ids:3x9,past:3x10x4",
    ]
