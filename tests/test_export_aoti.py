"""AOTInductor artifacts: agreement, one copy of the weights, generation in a process without Python, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model, tokens
from sessions import check_interleaved

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import artifact

CPU_LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    """A byte-level model with tied embeddings, and its packages for the CPU."""
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256, tie_word_embeddings=True)
    root = tmp_path_factory.mktemp("aoti")
    model.save_pretrained(root / "checkpoint")
    assert main(["export", str(root / "checkpoint"), str(root / "artifact"), "--to", "aoti"]) == 0
    return model, root / "artifact"


def test_the_report_and_the_manifest(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    report = export.verify(folder, model)
    assert report.passed and report.error < 1e-5, str(report)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "aoti" and manifest["device"]["type"] == "cpu"
    files = {"prefill.pt2", "decode.pt2", "weights.safetensors", "aoti_generate.cpp", "reference.npz"}
    assert set(manifest["files"]) == files
    assert manifest["io"]["decode"]["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", 1]},
        {"name": "state.0.conv_state", "dtype": "float32", "shape": ["batch", 5, 48, 3]},
        {"name": "state.0.recurrent_state", "dtype": "float32", "shape": ["batch", 5, 2, 8, 8]},
    ]


def test_the_weights_are_stored_once(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 1.02 * parameters + 4096
    weight = model.lm_head.weight.detach().numpy().tobytes()
    for name in ("prefill.pt2", "decode.pt2"):
        with zipfile.ZipFile(folder / name) as archive:
            assert not any(weight[:256] in archive.read(entry) for entry in archive.namelist())


def test_both_packages_read_the_same_tensors(exported: tuple[MoMForCausalLM, Path]) -> None:
    """What is written into the runner's weights, both packages see: neither has a copy."""
    runner = export.load(exported[1])
    assert isinstance(runner, export.AotiRunner)
    before = [np.asarray(runner(ids)[0]) for ids in ([[65]], [[65, 66]])]
    for weight in runner._weights.values():
        weight.zero_()
    for ids, logits in zip(([[65]], [[65, 66]]), before, strict=True):
        assert logits.any() and not np.asarray(runner(ids)[0]).any()


def test_a_state_passed_in_is_unchanged(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    runner = export.load(folder)
    with torch.no_grad():
        state = model(tokens(2, 10)).state
        for ids in (tokens(2, 1), tokens(2, 70)):
            before = [{name: value.clone() for name, value in layer.items()} for layer in state]
            logits, present = runner(ids, state)
            assert torch.allclose(logits, model(ids, state=state).logits, atol=1e-4)
            for layer, values in enumerate(before):
                for name, value in values.items():
                    assert torch.equal(value, state[layer][name]) and not torch.equal(value, present[layer][name])


def test_interleaved_conversations(exported: tuple[MoMForCausalLM, Path]) -> None:
    check_interleaved(exported[1])


def test_ties_go_to_the_lowest_memory(exported: tuple[MoMForCausalLM, Path]) -> None:
    """With equal router logits, memories 0 and 1 of 4 (and the shared one) are chosen."""
    runner = export.load(exported[1])
    assert isinstance(runner, export.AotiRunner)
    next(weight for name, weight in runner._weights.items() if name.endswith("router.weight")).zero_()
    _, state = runner(tokens(2, 70))
    for _ in range(2):
        memories = state[0]["recurrent_state"]
        assert memories[:, :2].any() and memories[:, 4].any() and not memories[:, 2:4].any()
        _, state = runner(tokens(2, 1), state)


def test_the_example_generates_without_python(
    exported: tuple[MoMForCausalLM, Path], tmp_path: Path, compile_cpp: Callable[..., Path]
) -> None:
    model, folder = exported
    root = Path(torch.__file__).parent
    binary = compile_cpp(
        folder / "aoti_generate.cpp",
        [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"],
        [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-Wl,--no-as-needed", *CPU_LIBRARIES],
    )
    libraries = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in libraries and "libpython" not in libraries
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([str(binary), *arguments], capture_output=True, env=environment, check=False)

    for length in (1, 80):  # the second crosses a chunk boundary
        prompt = tokens(1, length, 256)
        done = run(str(folder), " ".join(map(str, prompt[0].tolist())), "60", "--ids")
        assert done.returncode == 0, done.stderr
        expected = model.generate(prompt, 60, eos_token_id=-1)[0, length:].tolist()
        assert [int(token) for token in done.stdout.split()] == expected
    expected = model.generate(torch.tensor([list(b"The ")]), 30)[0].tolist()
    assert run(str(folder), "The ", "30").stdout == bytes(i for i in expected if i < 256) + b"\n"
    done = run(str(tmp_path), "The ")
    assert done.returncode == 1 and b"weights.safetensors must be there; copy the whole folder" in done.stderr
    assert b"usage: aoti_generate FOLDER PROMPT" in run().stderr


def _edited(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    manifest = {**json.loads((target / "manifest.json").read_text()), **changes}
    manifest["manifest_sha256"] = artifact._body_hash(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_what_it_was_compiled_for(exported: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    _, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"device must be cpu, for which the packages were compiled, got cuda; export"):
        export.load(folder, device="cuda")
    other = _edited(folder, tmp_path / "a", device={"type": "cpu", "architecture": "POWER10"})
    with pytest.raises(ValueError, match=r"cpu must have POWER10, for which .*; export again here"):
        export.load(other)
    older = _edited(folder, tmp_path / "b", versions={**manifest["versions"], "torch": "2.9.1+cpu"})
    with pytest.raises(ValueError, match=r"torch must be 2\.9, with which .*; run: pip install torch==2\.9\.1, or exp"):
        export.load(older)
    if not torch.cuda.is_available():
        gpu = _edited(folder, tmp_path / "c", device={"type": "cuda", "architecture": "sm_90"})
        with pytest.raises(ValueError, match="device must be there, got cuda, for which the packages were compiled"):
            export.load(gpu)
        with pytest.raises(ValueError, match="device must be there to compile for it, got 'cuda' and no GPU"):
            export.to_aoti(exported[0], tmp_path / "d", device="cuda")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        export.to_aoti(exported[0], tmp_path / "d", device="tpu")


def test_the_order_of_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    from mom_compile.export.aoti_runner import check_device

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    check_device({"type": "cpu", "architecture": "AVX2"}, torch.device("cpu"))
    check_device({"type": "cpu", "architecture": "DEFAULT"}, torch.device("cpu"))
    with pytest.raises(ValueError, match="cpu must have AVX512, for which the packages were compiled, got AVX2"):
        check_device({"type": "cpu", "architecture": "AVX512"}, torch.device("cpu"))


def test_files_of_another_model(exported: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    from mom_compile._files import read_safetensors, write_safetensors

    folder = Path(shutil.copytree(exported[1], tmp_path / "x"))
    weights = read_safetensors(folder / "weights.safetensors")
    del weights["model.model.norm.weight"]
    write_safetensors(folder / "weights.safetensors", weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    state = [{"name": "recurrent_state", "shape": [5, 2, 8, 8], "dtype": "float32"}]
    artifact.write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=r"decode\.pt2 must open in torch .*model\.norm\.weight.*or export again"):
        export.load(folder)([[1]])
    artifact.write_manifest(folder, {**manifest, "state": state})
    shutil.copy(exported[1] / "weights.safetensors", folder)
    artifact.write_manifest(folder, {**manifest, "state": state})
    with pytest.raises(ValueError, match=r"must take the states 0\.recurrent_state=5,2,8,8, got 0\.conv_state=5,48,3;"):
        export.load(folder).check_structure()


def test_the_kernels_are_traced_into_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for CUDA: no operator of ours is left, its kernels are nodes of the graph."""
    import importlib

    from mom_compile.export.aoti_artifact import _one_chunk_is_a_size, export_kernels

    # On a CPU the operators read the values of these tables; on a GPU they cannot.
    monkeypatch.setattr(importlib.import_module("mom_compile.ops.dispatch.op"), "_check_values", lambda *_: None)
    monkeypatch.setattr(importlib.import_module("mom_compile.ops.grouped_linear.op"), "_check_offsets", lambda *_: None)
    model = tiny_model(num_hidden_layers=1)
    for decode, least in ((True, 3), (False, 15)):
        with _one_chunk_is_a_size():
            program = export_kernels(model, decode)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("triton_kernel_wrapper" in name for name in names) >= least
        assert not any("mom" in name for name in names)


PROBE = """
import sys, torch
program = torch.export.export(torch.nn.Linear(8, 8).cuda(), (torch.randn(2, 8, device="cuda"),))
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], "model", False, 1, -1)
"""


@pytest.mark.gpu
def test_the_example_generates_on_a_gpu(tmp_path: Path, compile_cpp: Callable[..., Path]) -> None:
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "linear.pt2")], capture_output=True, check=False
    )
    if probe.returncode < 0:
        pytest.skip(f"this torch and compiler cannot load a package of one torch.nn.Linear: signal {-probe.returncode}")
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    folder = tmp_path / "artifact"
    assert export.to_aoti(model, folder, device="cuda").passed
    operators = json.loads((folder / "manifest.json").read_text())["io"]
    assert operators["decode"]["operators"]["triton::decode_state_kernel"] == 1
    assert operators["prefill"]["operators"]["triton::chunk_scan_kernel"] == 1
    root = Path(torch.__file__).parent
    binary = compile_cpp(
        folder / "aoti_generate.cpp",
        [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"],
        [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-Wl,--no-as-needed", *CPU_LIBRARIES, "-ltorch_cuda", "-lc10_cuda"],
    )
    prompt = tokens(1, 80, 256)
    command = [str(binary), str(folder), " ".join(map(str, prompt[0].tolist())), "60", "--ids"]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = model.generate(prompt, 60, eos_token_id=-1)[0, 80:].tolist()
    assert [int(token) for token in done.stdout.split()] == expected


def test_command_line(exported: tuple[MoMForCausalLM, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported[1])]) == 0
    assert "logits against the recorded reference" in capsys.readouterr().out
    assert main(["generate", str(exported[1]), "--greedy", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert main(["inspect", str(exported[1])]) == 0
    out = capsys.readouterr().out
    assert "aoti artifact" in out and "aten::linear 9" in out and "higher_order::scan 1" in out
