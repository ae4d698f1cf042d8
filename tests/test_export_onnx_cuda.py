"""The artifact of kernels for onnxruntime: its files, and its library over a stand-in for the CUDA driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from support import INTERPRET

from mom_compile.cli import main
from mom_compile.export import load, to_onnx_cuda, verify
from mom_compile.export.artifact import read_manifest
from mom_compile.export.kernel_function import Dtypes
from mom_compile.export.kernel_functions import functions
from mom_compile.export.kernel_table import record
from mom_compile.export.onnx_runner import KERNELS_FOLDER
from mom_compile.export.operator_library import CUDA_OPERATORS

pytest.importorskip("triton")
pytest.importorskip("onnxruntime")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

INCLUDE = os.environ.get("ONNXRUNTIME_INCLUDE")
SOURCES = Path(__file__).parent / "cpp"
ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cuda") / "artifact"
    report = to_onnx_cuda(tiny_model(), target, precision="float32", compute_capabilities=[90])
    if not ON_GPU:
        assert [check.name for check in report.checks] == ["structure and operators", "not run on this machine"]
    return target


def test_the_folder(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest["target"] == "onnxruntime-cuda" and manifest["graphs"] == {
        "prefill": "prefill.onnx",
        "decode": "decode.onnx",
    }
    assert manifest["io"]["decode"]["operators"] == {
        "Gather": 1,
        "Reshape": 1,
        "mom::Kernels": 8,
        "mom::KernelsInPlace": 4,
    }
    assert not {"If", "Loop", "Scan"} & set(manifest["io"]["prefill"]["operators"])
    assert (folder / KERNELS_FOLDER / "mom_onnx.cpp").is_file()
    assert [*(folder / KERNELS_FOLDER / "sm90").glob("*.cubin")]


@pytest.mark.skipif(ON_GPU, reason="says it without a GPU")
def test_it_says_what_is_missing_to_run(folder: Path) -> None:
    runner = load(folder)
    assert "install onnxruntime-gpu" in (runner.why_not() or "")
    with pytest.raises(
        ImportError, match="onnxruntime must have CUDAExecutionProvider, got none; install onnxruntime-gpu"
    ):
        runner(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="providers must have CUDAExecutionProvider for this artifact"):
        load(folder, providers=["CPUExecutionProvider"])
    report = verify(folder, tiny_model())
    assert report.passed and "not run on this machine" in str(report)


def test_bad_input(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="precision must be one of float16, bfloat16, float32, got 'int8'"):
        to_onnx_cuda(model, tmp_path / "a", precision="int8")
    with pytest.raises(ValueError, match="compute_capabilities must be some of .*, got 75"):
        to_onnx_cuda(model, tmp_path / "a", compute_capabilities=[75])
    with pytest.raises(ValueError, match=r"num_heads \* head_dim must be a multiple of 8 .*, got 6"):
        to_onnx_cuda(tiny_model(num_heads=1, head_dim=6), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint")
    arguments = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "a"), "--to", "onnxruntime-cuda"]
    assert main([*arguments, "--compute-capability", "90"]) == 0
    assert "onnxruntime-cuda, largest relative error" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "a")
    assert manifest["precision"] == "float16" and "prefill_forced" in manifest["graphs"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_on_a_gpu(precision: str, tmp_path: Path) -> None:
    """The export verifies; conversations of CUDA graphs that take turns give what each gives alone."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    major, minor = torch.cuda.get_device_capability()
    model = tiny_model(head_dim=64)
    report = to_onnx_cuda(model, tmp_path / "a", precision=precision, compute_capabilities=[10 * major + minor])
    if not (tmp_path / "a" / KERNELS_FOLDER / CUDA_OPERATORS.file).is_file():
        pytest.skip("needs onnxruntime's C++ headers")
    assert report.passed and len(report.checks) > 4
    runner, ids = load(tmp_path / "a"), torch.randint(0, 50, (2, 30)).numpy()
    states = [runner(row[None, :20])[1] for row in ids]
    loops = [runner.decode_loop(state, 1) for state in states]
    mixed = [[loops[row](ids[row : row + 1, t]).copy() for row in range(2)] for t in range(20, 30)]
    for row, state in enumerate(states):
        step = runner.decode_loop(state, 1)
        for t in range(20, 30):
            assert (step(ids[row : row + 1, t]) == mixed[t - 20][row]).all()


# ---- the library -----------------------------------------------------------------------------------------------------

RUN = """
import sys
import numpy, onnxruntime
folder, library, name, batch, length, aliased = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
sizes = {"batch": int(batch), "sequence": int(length)}
values, binding = {}, session.io_binding()
for value in (*session.get_inputs(), *session.get_outputs()):
    key = value.name.replace("present", "past_key_values") if aliased == "1" else value.name
    if key not in values:
        dtype = numpy.int64 if "int64" in value.type else numpy.float32
        array = numpy.zeros([sizes.get(size, size) for size in value.shape], dtype)
        values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bind = binding.bind_ortvalue_output if value in session.get_outputs() else binding.bind_ortvalue_input
    bind(value.name, values[key])
session.run_with_iobinding(binding)
"""


def _build(source: Path, target: Path, *arguments: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), *arguments, "-ldl", "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    """Of the same sources, for the provider that every onnxruntime has."""
    if INCLUDE is None or not (Path(INCLUDE) / "onnxruntime_cxx_api.h").is_file():
        pytest.skip("needs onnxruntime's C++ headers: .ci/onnxruntime-headers FOLDER, ONNXRUNTIME_INCLUDE=FOLDER")
    kernels = folder / KERNELS_FOLDER
    flags = [f"-isystem{INCLUDE}", '-DMOM_PROVIDER="CPUExecutionProvider"']
    # Beside the other one, where it looks for the kernels.
    source, other = (kernels / name for name in CUDA_OPERATORS.sources)
    return _build(source, kernels / "libmom_onnx_on_cpu.so", *flags, str(other))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("driver")
    _build(SOURCES / "stand_in_cuda.cpp", target / "libcuda.so.1")
    return target


def _run(folder: Path, library: Path, driver: Path, name: str, batch: int, length: int, aliased: bool) -> Any:
    log = driver / f"log_{name}_{batch}_{int(aliased)}"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "STAND_IN_LOG": str(log)}
    arguments = [str(folder), str(library), name, str(batch), str(length), str(int(aliased))]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], env=environment, capture_output=True, text=True)
    return done, log.read_text().splitlines() if log.exists() else []


def _expected(calls: list[tuple[str, tuple[int, int, int]]], overlap: bool = True) -> list[str]:
    config = tiny_model().config
    known = {function.name: function for function in functions(config, Dtypes(torch.float32, torch.float32))}
    lines = []
    for name, units in calls:
        for call in record(known[name], 90, units):
            grid = " ".join(map(str, (*call.grid, 1, 1)[:3]))
            more = " overlap" * (overlap and bool(call.config.overlap))
            lines.append(f"{call.kernel.fn.__name__} {grid} {32 * call.config.num_warps}{more}")
    return lines


@pytest.mark.parametrize("aliased", [False, True])
def test_a_token_launches_what_it_must(folder: Path, library: Path, driver: Path, aliased: bool) -> None:
    """Of six sequences, where the products take four at a time; states are copied where they have two buffers."""
    done, log = _run(folder, library, driver, "decode", 6, 1, aliased)
    assert done.returncode == 0, done.stderr
    expected = _expected(_calls_of_a_token())
    assert [line for line in log if not line.startswith("copy")] == expected
    assert len([line for line in expected if line.endswith("overlap")]) == len(expected) - 1  # all but the last norm
    config = tiny_model().config
    heads = 6 * config.total_memories * config.value_heads * config.head_dim * config.value_dim * 4
    windows = 6 * config.total_memories * config.conv_channels * (config.conv_size - 1) * 4
    copies = [] if aliased else 2 * [f"copy {heads}", f"copy {windows}"]
    assert [line for line in log if line.startswith("copy")] == copies


def test_a_driver_that_knows_no_overlap(folder: Path, library: Path, tmp_path: Path) -> None:
    _build(SOURCES / "stand_in_cuda.cpp", tmp_path / "libcuda.so.1", "-DOLD_DRIVER")
    done, log = _run(folder, library, tmp_path, "decode", 6, 1, True)
    assert done.returncode == 0, done.stderr
    assert log == _expected(_calls_of_a_token(), overlap=False)


def _calls_of_a_token() -> list[tuple[str, tuple[int, int, int]]]:
    """Of six sequences."""
    names = ["input", "step", "output", "mlp_in", "mlp_out"]
    calls: list[tuple[str, tuple[int, int, int]]] = []
    for name in [*names * 2, "norm", "head"]:
        if name == "norm":
            calls.append(("prefill_head", (6, 0, 0)))
        elif name == "step":
            calls.append(("decode_step_gated_delta", (6, 0, 0)))
        else:
            calls += [(f"decode_{name}_gated_delta", (size, 0, 0)) for size in (4, 2)]
    return calls


def test_a_prefill_launches_what_it_must(folder: Path, library: Path, driver: Path) -> None:
    done, log = _run(folder, library, driver, "prefill", 2, 70, False)
    assert done.returncode == 0, done.stderr
    config, packed, tokens = tiny_model().config, (2, 0, 140), (140, 0, 0)
    chunks = (140 * config.topk + 2 * config.num_memories * 63) // 64 + (140 + 2 * 63) // 64
    packed = (2, chunks, 140)
    layer = [("prefill_input", tokens), ("prefill_small_gated_delta", tokens), ("route", tokens), ("dispatch", packed)]
    layer += [
        (name, packed) for name in ("permute", "kv_rows", "conv_qkv", "gate_rows_gated_delta", "chunk_gated_delta")
    ]
    layer += [("combine", packed), ("gated_rms_norm", (280, 0, 0)), ("prefill_norm", tokens), ("swiglu", tokens)]
    expected = _expected([*layer * 2, ("prefill_head", tokens)])  # type: ignore[list-item]
    # The runtime chooses an order among nodes that do not depend on one another.
    assert sorted(log) == sorted(expected)


def test_a_graph_of_another_pack_is_refused(folder: Path, library: Path, driver: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(folder / "decode.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Kernels")
    for attribute in node.attribute:
        if attribute.name == "function":
            attribute.s = b"decode_input_mamba2"
    onnx.save(model, tmp_path / "decode.onnx")
    shutil.copyfile(folder / "weights.bin", tmp_path / "weights.bin")
    done, _ = _run(tmp_path, library, driver, "decode", 1, 1, False)
    assert done.returncode != 0 and "the pack must have decode_input_mamba2, got none" in done.stderr
