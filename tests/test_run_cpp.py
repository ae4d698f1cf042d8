"""run.cpp of an ONNX folder, built against ONNX Runtime's C++ headers and the library of its wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tiny_model, tokens

from mom_compile import MoMForCausalLM, export

GIVEN = os.environ.get("ONNXRUNTIME_INCLUDE")
FOLDERS = [GIVEN] if GIVEN else ["/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/local/include"]
INCLUDE = next((folder for folder in FOLDERS if (Path(folder) / "onnxruntime_cxx_api.h").is_file()), None)
if GIVEN and INCLUDE is None:
    raise ValueError(f"ONNXRUNTIME_INCLUDE must be a folder with onnxruntime_cxx_api.h, got {GIVEN!r}")
pytestmark = pytest.mark.skipif(
    INCLUDE is None or shutil.which("g++") is None,
    reason="needs g++ and ONNX Runtime's C++ headers: set ONNXRUNTIME_INCLUDE, see .ci/onnxruntime-headers",
)


def test_states_of_16_bits(tmp_path: Path, compile_cpp: Callable[..., Path]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    export.to_onnx(model, tmp_path / "x", state_dtype="bfloat16")
    binary = compile_cpp(tmp_path / "x" / "run.cpp", [f"-I{INCLUDE}"], [str(library), f"-Wl,-rpath,{tmp_path}"])
    done = subprocess.run(
        [str(binary), str(tmp_path / "x"), "84 104 101", "30", "--ids"], capture_output=True, env={}, check=True
    )
    runner = export.load(tmp_path / "x")
    expected = [int(token[0]) for token in runner.generate([[84, 104, 101]], 30, eos_token_id=-1)]
    assert [int(token) for token in done.stdout.split()] == expected


def test_run_cpp(small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path, compile_cpp: Callable[..., Path]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, folder = small_artifact
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)  # the wheel lacks the name that programs ask for
    binary = compile_cpp(folder / "run.cpp", [f"-I{INCLUDE}"], [str(library), f"-Wl,-rpath,{tmp_path}"])

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([str(binary), *arguments], capture_output=True, env={}, check=False)

    for length in (1, 80):
        prompt = tokens(1, length, 256)
        done = run(str(folder), " ".join(map(str, prompt[0].tolist())), "60", "--ids")
        assert done.returncode == 0, done.stderr
        expected = model.generate(prompt, 60, eos_token_id=-1)[0, length:].tolist()
        assert [int(token) for token in done.stdout.split()] == expected
    text = model.generate(torch.tensor([list(b"The ")]), 30)[0].tolist()
    assert run(str(folder), "The ", "30").stdout == bytes(i for i in text if i < 256) + b"\n"
    done = run(str(tmp_path), "The ")
    assert done.returncode == 1 and b"prefill.onnx" in done.stderr
