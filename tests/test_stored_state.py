"""States of 16 bits as inputs and outputs of the graphs: dtypes, arithmetic, conversions, the folder's own programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model, tokens
from support import relative

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import artifact
from mom_compile.export.stored_state import array_dtype

CASES = (("onnxruntime", "float16"), ("onnxruntime", "bfloat16"), ("portable", "float16"), ("portable", "bfloat16"))
ERRORS = {"float16": 2**-11, "bfloat16": 2**-8}


@pytest.fixture(scope="module")
def model() -> MoMForCausalLM:
    return tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(case), marks=[] if index in (1, 2) else [pytest.mark.slow])
        for index, case in enumerate(CASES)
    ],
)
def exported(
    request: pytest.FixtureRequest, model: MoMForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The dtype, and an artifact of the model with states of it."""
    target, dtype = request.param
    root = tmp_path_factory.mktemp("stored")
    model.save_pretrained(root / "model")
    command = ["export", str(root / "model"), str(root / "x"), "--to", target, "--state-dtype", dtype]
    assert main(command) == 0
    return dtype, root / "x"


def test_the_manifest_and_the_graphs(exported: tuple[str, Path]) -> None:
    import onnx

    dtype, folder = exported
    manifest = artifact.read_manifest(folder)
    assert {entry["name"]: entry["dtype"] for entry in manifest["state"]} == {
        "conv_state": "float32",
        "recurrent_state": dtype,
    }
    checks = {check["name"]: check for check in manifest["parity"]["checks"]}
    assert manifest["tolerance"] == 1e-4 and checks["prefill logits"]["error"] < 1e-5  # one call is that of float32
    assert 0.01 * ERRORS[dtype] < checks["prefill states"]["error"] < ERRORS[dtype]
    assert "64 decode steps with the same routing, past and present in one buffer" in checks
    kinds = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
    for file in manifest["graphs"].values():
        graph = onnx.load(str(folder / file), load_external_data=False).graph
        states = [x for x in (*graph.input, *graph.output) if x.name.endswith(("recurrent_state", "touched_state"))]
        assert len(states) == 2 and {x.type.tensor_type.elem_type for x in states} == {kinds[dtype]}
        # The only thing done in 16 bits is to move: what computes comes between a Cast to float32 and one back.
        producer = {name: node for node in graph.node for name in node.output}
        small = {"past_key_values.0.recurrent_state"}
        for node in graph.node:
            if small.intersection(node.input) and node.op_type != "Cast":
                assert node.op_type in ("Reshape", "Gather", "Squeeze", "Unsqueeze", "Flatten"), node.op_type
                small.update(node.output)
        last = producer[states[-1].name]
        while last.op_type == "Reshape":
            last = producer[last.input[0]]
        assert last.op_type == "Cast" and last.attribute[0].i == kinds[dtype]
    if "decode_touched" in manifest["graphs"]:  # what was not selected is not widened either
        graph = onnx.load(str(folder / "decode_touched.onnx"), load_external_data=False).graph
        first = [node.op_type for node in graph.node if "past_key_values.0.recurrent_state" in node.input]
        assert "Cast" not in first


def test_states_of_every_dtype_are_taken(model: MoMForCausalLM, exported: tuple[str, Path]) -> None:
    dtype, folder = exported
    runner = export.load(folder)
    ids = tokens(2, 90)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :40]).state
    assert runner.init_state(1)[0]["recurrent_state"].dtype == array_dtype(dtype)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        state = tuple({**layer, "recurrent_state": layer["recurrent_state"].to(kind)} for layer in first)
        logits, present = runner(ids[:, 40:89].numpy(), state)
        assert present[0]["recurrent_state"].dtype == array_dtype(dtype)
        assert present[0]["conv_state"].dtype == np.float32
        assert relative(torch.from_numpy(logits), whole[:, 40:89]) < 3e-3
    back = tuple({k: torch.from_numpy(v.astype(np.float32)) for k, v in layer.items()} for layer in present)
    with torch.no_grad():
        out = model(ids[:, 89:], state=back)
    assert relative(out.logits, whole[:, 89:]) < 3e-3


def test_a_float32_artifact_goes_on(exported: tuple[str, Path], small_artifact: tuple[MoMForCausalLM, Path]) -> None:
    """Widening is exact."""
    dtype, folder = exported
    _, state = export.load(folder)([[1, 2, 3]])
    exact = export.load(small_artifact[1])
    one, _ = exact([[4]], state)
    two, _ = exact([[4]], [{name: value.astype(np.float32) for name, value in layer.items()} for layer in state])
    assert np.array_equal(one, two)


def test_untouched_memories_stay_as_they_were(exported: tuple[str, Path]) -> None:
    runner = export.load(exported[1])
    _, state = runner(tokens(1, 30).numpy())
    _, after = runner([[7]], state)
    before, after = state[0]["recurrent_state"], after[0]["recurrent_state"]
    changed = (before.view(np.uint16) != after.view(np.uint16)).any((0, 2, 3, 4))
    assert changed.sum() == 3 and changed[-1]  # topk of 4, and the shared one


def test_run_py(exported: tuple[str, Path]) -> None:
    _, folder = exported
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), "The ", "--max-new-tokens", "40"],
        capture_output=True,
        check=True,
    )
    ids = [*b"The "] + [int(token[0]) for token in export.load(folder).generate([[*b"The "]], 40)]
    assert done.stdout.decode() == bytes(i for i in ids if i < 256).decode(errors="replace") + "\n"


@pytest.mark.slow
def test_weights_and_states_of_float16(model: MoMForCausalLM, tmp_path: Path) -> None:
    report = export.to_onnx(model, tmp_path / "x", precision="float16", state_dtype="float16")
    assert "prefill logits, the model's routing forced in" in {check.name for check in report.checks}
    assert artifact.read_manifest(tmp_path / "x")["state"][1]["dtype"] == "float16"


def test_messages(
    model: MoMForCausalLM, exported: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = "state_dtype must be one of float32, float16, bfloat16, got 'int8'; choose one of them"
    with pytest.raises(ValueError, match=known):
        export.to_onnx(model, tmp_path / "x", state_dtype="int8")
    for to in (export.to_genai, export.to_triton_server):
        with pytest.raises(ValueError, match="state_dtype must be one of float32, float16, got 'bfloat16'"):
            to(model, tmp_path / "x", state_dtype="bfloat16")
    command = ["export", str(exported[1].parent / "model"), str(tmp_path / "x"), "--to", "pt2"]
    assert main([*command, "--state-dtype", "float16"]) == 2
    assert "--state-dtype must go with --to onnxruntime or --to portable" in capsys.readouterr().err
    if exported[0] == "bfloat16":
        with pytest.raises(ValueError, match="providers must be the CPU's for a bfloat16 state"):
            export.load(exported[1], providers=["CUDAExecutionProvider"])
