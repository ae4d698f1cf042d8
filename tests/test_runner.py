"""The onnxruntime runner: generation, bad input, and that it needs neither torch nor triton."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sessions import check_interleaved

from mom_compile import MoMForCausalLM, export
from mom_compile.export.operator_library import CPU_OPERATORS

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Block())
"""


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_equals_the_model(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = small_artifact
    prompt = torch.randint(0, 256, (2, 70))
    runner = export.load(folder)
    steps = np.stack(list(runner.generate(prompt, 40, eos_token_id=-1)), 1)
    assert np.array_equal(steps, model.generate(prompt, 40, eos_token_id=-1)[:, 70:].numpy())
    assert list(runner.generate(prompt, 0)) == []


def test_sampling_is_repeatable(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    runner = export.load(small_artifact[1])

    def draw(seed: int) -> list[int]:
        return [int(x[0]) for x in runner.generate([[65, 66]], 30, temperature=1.0, top_p=0.9, seed=seed)]

    assert draw(1) == draw(1) and draw(1) != draw(2)


def test_a_stopped_row_is_filled(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    runner = export.load(small_artifact[1])
    prompt = np.array([[65, 66, 67], [68, 69, 70]])
    free = np.stack(list(runner.generate(prompt, 20, eos_token_id=-1)), 1)
    eos = int(free[0, 4])
    stopped = np.stack(list(runner.generate(prompt, 20, eos_token_id=eos)), 1)
    first = int(np.argmax(free[0] == eos))
    assert (stopped[0, first:] == eos).all() and np.array_equal(stopped[0, :first], free[0, :first])


def test_long_prompts_go_through_in_pieces(
    small_artifact: tuple[MoMForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mom_compile.export import runner as module

    runner = export.load(small_artifact[1])
    prompt = np.random.default_rng(0).integers(0, 256, (1, 100))
    whole = list(runner.generate(prompt, 5, eos_token_id=-1))
    monkeypatch.setattr(module, "PREFILL_TOKENS", 33)
    assert np.array_equal(whole, list(runner.generate(prompt, 5, eos_token_id=-1)))


def test_interleaved_conversations(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    check_interleaved(small_artifact[1])


def test_an_artifact_runs_without_torch(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = small_artifact
    code = """
from mom_compile import export
runner = export.load(sys.argv[1])
print([int(x[0]) for x in runner.generate([[84, 104, 101]], 12, eos_token_id=-1)])
assert export.verify(sys.argv[1]).passed
assert not {"torch", "triton"} & set(sys.modules)
"""
    expected = model.generate(torch.tensor([[84, 104, 101]]), 12, eos_token_id=-1)[0, 3:].tolist()
    assert _run(code, str(folder)).strip() == str(expected)


def test_run_py_needs_only_numpy_and_onnxruntime(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = small_artifact
    code = """
import os
import runpy
sys.argv = ["run.py", "The ", "--max-new-tokens", "12"]
runpy.run_path(FOLDER + "/run.py", run_name="__main__")
assert not {"torch", "triton", "mom_compile"} & set(sys.modules)
""".replace("FOLDER", repr(str(folder)))
    ids = model.generate(torch.tensor([list(b"The ")]), 12, eos_token_id=256)[0].tolist()
    expected = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert _run(code) == expected + "\n"


def test_run_py_on_an_old_runtime(small_artifact: tuple[MoMForCausalLM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("BranchwiseRMSNorm is not a registered function/op\nand more")

    made_with = onnxruntime.__version__
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    run = str(small_artifact[1] / "run.py")
    with pytest.raises(RuntimeError, match="not a registered function"):  # as new as the export: something else
        runpy.run_path(run, run_name="__main__")
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.1")
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(run, run_name="__main__")
    wanted = ".".join(made_with.split(".")[:2])
    graph = "prefill" if CPU_OPERATORS.missing(small_artifact[1]) else "prefill_cpu"
    assert refused.value.code == (
        f"onnxruntime must open {graph}.onnx, made with {made_with}, got 1.9.1; "
        f'run: pip install --upgrade "onnxruntime>={wanted}" (BranchwiseRMSNorm is not a registered function/op)'
    )


def test_messages(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    runner = export.load(small_artifact[1])
    with pytest.raises(
        ValueError, match=r"input_ids must be \[B, T\] integers with at least one token, got shape \(3,\)"
    ):
        runner([1, 2, 3])
    with pytest.raises(ValueError, match="at least one token"):
        runner(np.zeros((1, 0), np.int64))
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, vocab_size = 257\), got 300"):
        runner([[300]])
    with pytest.raises(ValueError, match="state must have one entry for each of the 1 layers, got 2"):
        runner([[1]], runner.init_state(1) * 2)
    with pytest.raises(ValueError, match=r"state\[0\]\['conv_state'\] must have shape \(1, 5, 48, 3\), got \(2, 5"):
        runner([[1]], runner.init_state(2))
    wrong = tuple({name: value.astype(np.float64) for name, value in layer.items()} for layer in runner.init_state(1))
    with pytest.raises(ValueError, match="must be one of float32, float16, bfloat16, got float64; convert"):
        runner([[1]], wrong)
    with pytest.raises(ValueError, match=r"state\[0\] must hold conv_state, recurrent_state, got key"):
        runner([[1]], [{"key": np.zeros(1)}])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        runner.init_state(0)
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\], got 0"):
        runner.generate([[1]], 5, top_p=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        runner.generate([[1]], -1)
    with pytest.raises(ValueError, match="at least one token"):
        runner.generate([[]], 5)


def test_cuda_computes_float32_products_in_float32() -> None:
    from mom_compile.export._onnxruntime import exact_providers

    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    assert exact_providers([cuda, cpu]) == [(cuda, {"use_tf32": "0"}), cpu]
    asked = (cuda, {"use_tf32": "1", "device_id": "1"})
    assert exact_providers([asked], {"enable_cuda_graph": "1"}) == [(cuda, {**asked[1], "enable_cuda_graph": "1"})]


def test_cuda_takes_a_kernel_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from mom_compile.export._onnxruntime import fit_linear_attention

    name = "ORT_LINEAR_ATTENTION_COL_SEQ_THRESHOLD"
    monkeypatch.setenv(name, "", prepend=None)
    monkeypatch.delenv(name)
    fit_linear_attention(128, 128)
    assert name not in os.environ
    fit_linear_attention(256, 256)
    assert int(os.environ[name]) > 2**16
    monkeypatch.setenv(name, "7")
    fit_linear_attention(256, 256)
    assert os.environ[name] == "7"


def test_a_session_with_one_thread(small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    ids = np.arange(5)[None]
    one, usual = (export.load(small_artifact[1], threads=threads)(ids)[0] for threads in (1, None))
    assert np.allclose(one, usual, atol=1e-5)
