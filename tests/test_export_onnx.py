"""ONNX artifacts of both targets against the model: every rule, every variant of the layer, a real checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import reuse_graphs
from models import VARIANTS, tiny_model, tokens, two_layers
from support import launches, relative

from mom_compile import MoMForCausalLM, export
from mom_compile.export import onnx_artifact, writing
from mom_compile.export.onnx_artifact import TARGETS
from mom_compile.export.operator_library import CPU_OPERATORS
from mom_compile.report import Report

DATA = Path(__file__).parent / "data"


# Of two layers each, which takes longer than several of one: what is of one target or rule is below, or slow.
RULES = {"onnxruntime": "retention", "portable": "delta", "opset27": "linear"}


@pytest.fixture(scope="module", params=TARGETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    """A model of two rules, and its artifact. In the second layer every memory ties at every token.

    The slow tests below export the other rules; a token of each has test_token_nodes.py, the portable ones
    test_lowerings.py.
    """
    model = two_layers(RULES[request.param])
    folder = tmp_path_factory.mktemp("artifact") / str(request.param)
    export.to_onnx(model, folder, target=request.param)
    return model, folder


def _names(report: Report) -> list[str]:
    return [check.name for check in report.checks]


def test_the_report_and_the_manifest(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    report = export.verify(folder, model)
    assert report.passed and report.error < 1e-4, str(report)
    assert {"prefill logits", "prefill states", "64 decode steps", "greedy text"} <= set(_names(report))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["state_layout_version"] == 1
    assert manifest["parity"]["passed"] and manifest["parity"]["error"] < 1e-4
    graphs = {"prefill.onnx", "decode.onnx"}
    if manifest["target"] == "onnxruntime":
        graphs |= {"decode_touched.onnx", "prefill_cpu.onnx", "decode_cpu.onnx", *CPU_OPERATORS.sources}
        graphs |= set() if CPU_OPERATORS.missing(folder) else {CPU_OPERATORS.file}
    assert set(manifest["files"]) == {*graphs, "weights.bin", "run.py", "run.cpp", "reference.npz"}
    first = manifest["io"]["prefill"]["inputs"][:3]
    assert first[0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    # M' = 5 memories; C = 2 heads * 8 * 2 + 4 * 8 channels; 4 value heads of 8 x 8.
    assert first[1] == {
        "name": "past_key_values.0.conv_state",
        "dtype": "float32",
        "shape": ["batch", 5 * 64, 3],
    }
    assert first[2] == {
        "name": "past_key_values.0.recurrent_state",
        "dtype": "float32",
        "shape": ["batch", 5 * 4, 8, 8],
    }
    operators = manifest["io"]["prefill"]["operators"]
    decode = {
        name for graph in manifest["io"] if graph.startswith("decode") for name in manifest["io"][graph]["operators"]
    }
    assert not decode & {"If", "Loop", "Scan", "MemcpyToHost", "MemcpyFromHost"}  # what a CUDA graph cannot hold
    if manifest["target"] == "onnxruntime":
        assert operators["com.microsoft::LinearAttention"] == 2
        assert manifest["io"]["decode"]["operators"]["com.microsoft::LinearAttention"] == 2
    else:
        assert not any("::" in name for name in operators)
        opset27 = manifest["target"] == "opset27"
        assert operators["LinearAttention" if opset27 else "Scan"] == 2
        assert operators.get("CausalConvWithState", 0) == (2 if opset27 else 0)
        assert manifest["io"]["prefill"]["opsets"] == {"ai.onnx": 27 if opset27 else 20}


def test_no_file_names_the_exporting_machine(exported: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = exported
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(Path(__file__).parent.parent).encode() not in content, path
        assert b"stack_trace" not in content and b"site-packages" not in content, path


def test_the_weights_are_stored_once(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    data = (folder / "weights.bin").read_bytes()
    found = 0
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if weight.nbytes > onnx_artifact.INLINE_BYTES:
            forms = {weight.tobytes(), weight.T.tobytes(), weight.reshape(-1, weight.shape[-1]).T.tobytes()}
            count = sum(data.count(form) for form in forms)
            assert count <= 1, name  # none: the graph joins the gates' projections to one
            found += count
    assert found >= 6 * model.config.num_hidden_layers
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert len(data) < 1.1 * parameters + 256 * 1024  # masks and unit matrices of a chunk


def test_state_carries_across_engines(exported: tuple[MoMForCausalLM, Path]) -> None:
    """One conversation: PyTorch, then the artifact, then PyTorch again."""
    model, folder = exported
    runner = export.load(folder)
    ids = tokens(2, 150)
    with torch.no_grad():
        whole = model(ids)
        first = model(ids[:, :70])
        _, state = runner(ids[:, 70:71], first.state)
        logits, state = runner(ids[:, 71:140], state)
        back = tuple({name: torch.from_numpy(value) for name, value in layer.items()} for layer in state)
        last = model(ids[:, 140:], state=back)
    assert relative(torch.from_numpy(logits), whole.logits[:, 71:140]) < 1e-5
    assert relative(last.logits, whole.logits[:, 140:]) < 1e-5


def test_two_conversations_through_one_session(exported: tuple[MoMForCausalLM, Path]) -> None:
    """Interleaved, they give bit for bit what two sessions of their own give."""
    _, folder = exported
    ids = tokens(2, 40).numpy()
    shared = export.load(folder)
    states, loops = {}, {}
    for row in (0, 1):
        _, states[row] = shared(ids[row : row + 1, :20])
    for row in (0, 1):
        loops[row] = shared.decode_loop(states[row], 1)
    mixed = [(loops[0](ids[:1, t]).copy(), loops[1](ids[1:, t]).copy()) for t in range(20, 40)]
    for row in (0, 1):
        alone = export.load(folder)
        _, state = alone(ids[row : row + 1, :20])
        step = alone.decode_loop(state, 1)
        for t in range(20, 40):
            assert np.array_equal(mixed[t - 20][row], step(ids[row : row + 1, t]))


def test_loops_of_cuda_graphs_do_not_share_their_buffers(exported: tuple[MoMForCausalLM, Path]) -> None:
    """The way of a CUDA graph, which is of one session and its buffers; the CPU's provider ignores the option."""
    _, folder = exported
    captured = export.load(folder, providers=[("CPUExecutionProvider", {"enable_cuda_graph": "1"})])
    runner = export.load(folder)
    assert "as a CUDA graph" in captured.decode_ways() and "as a CUDA graph" not in runner.decode_ways()
    ids = tokens(2, 9).numpy()
    states = [runner(row[None, :5])[1] for row in ids]
    loops = [[one.decode_loop(state, 1) for state in states] for one in (captured, runner)]
    for t in range(5, 9):
        for row in range(2):
            ours, plain = (loop[row](ids[row : row + 1, t]) for loop in loops)
            np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


def test_a_state_passed_in_is_unchanged_and_forks(exported: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = exported
    runner = export.load(folder)
    ids = tokens(1, 20).numpy()
    _, state = runner(ids)
    before = [{name: value.copy() for name, value in layer.items()} for layer in state]
    one, _ = runner(ids[:, :3], state)
    step = runner.decode_loop(state, 1)
    step(ids[:, 0])
    again, _ = runner(ids[:, :3], state)
    assert np.array_equal(one, again)
    for layer, values in enumerate(before):
        for name, value in values.items():
            assert np.array_equal(state[layer][name], value)


def _check_ties(model: MoMForCausalLM, folder: Path, layer: int) -> None:
    """With equal router logits, the lowest memories (and the shared one) are chosen."""
    runner, config = export.load(folder), model.config
    ids = tokens(2, 70)
    with torch.no_grad():
        out = model(ids)
    logits, state = runner(ids.numpy())
    assert relative(torch.from_numpy(logits), out.logits) < 1e-5

    def chosen_alone(states: np.ndarray) -> bool:
        return not states[:, config.topk : config.num_memories].any() and bool(states[:, : config.topk].any())

    assert chosen_alone(state[layer]["recurrent_state"])
    step_logits, state = runner(ids[:, :1].numpy(), state)
    assert chosen_alone(state[layer]["recurrent_state"]) and np.isfinite(step_logits).all()


def test_ties_go_to_the_lowest_memory(exported: tuple[MoMForCausalLM, Path]) -> None:
    _check_ties(*exported, layer=1)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "target"), [("linear", "onnxruntime"), ("delta", "portable")])
def test_ties_of_three_in_six_memories(rule: str, target: str, tmp_path: Path) -> None:
    model = tiny_model(rule, num_hidden_layers=1, num_memories=6, topk=3)
    with torch.no_grad():
        model.model.layers[0].attn.router.weight.zero_()  # type: ignore[operator,union-attr]
    export.to_onnx(model, tmp_path / "x", target=target)
    _check_ties(model, tmp_path / "x", layer=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("single-kv-no-conv", "portable"), ("gva-all-memories", "onnxruntime")])
def test_variants(name: str, target: str, tmp_path: Path) -> None:
    rule = "delta" if target == "onnxruntime" else "mamba2"
    model = tiny_model(rule, num_hidden_layers=1, shared_mem=target == "onnxruntime", **VARIANTS[name])
    assert export.to_onnx(model, tmp_path / "x", target=target).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "target"), [("linear", "onnxruntime"), ("retention", "portable"), ("retention", "opset27")]
)
def test_rules(rule: str, target: str, tmp_path: Path) -> None:
    model = tiny_model(rule, num_hidden_layers=1, num_memories=6, topk=3)
    assert export.to_onnx(model, tmp_path / "x", target=target).passed


# The model itself, test_pretrained.py and, through an engine's graphs, make test-tensorrt have without this.
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_checkpoint_of_flash_linear_attention(target: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = DATA / "fla-mom-tiny"
    model = MoMForCausalLM.from_pretrained(folder)
    export.to_onnx(model, tmp_path / "x", target=target)
    expected = load_file(str(folder / "expected.safetensors"))
    runner = export.load(tmp_path / "x")
    logits, _ = runner(expected["input_ids"].numpy())
    assert relative(torch.from_numpy(logits), expected["logits"]) < 1e-5
    state = None
    pieces = []
    for t in range(expected["input_ids"].shape[1]):
        out, state = runner(expected["input_ids"][:, t : t + 1].numpy(), state)
        pieces.append(torch.from_numpy(out))
    assert relative(torch.cat(pieces, 1), expected["logits"]) < 1e-5


def test_a_wrong_graph_is_not_left_behind(
    small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = small_artifact
    reuse_graphs(monkeypatch, folder, wrong="decode.onnx")
    with pytest.raises(ValueError, match=r"agree with the model to 0\.0001(.|\n)*64 decode steps .*FAILED"):
        export.to_onnx(model, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []
    reuse_graphs(monkeypatch, folder)
    assert export.to_onnx(model, tmp_path / "artifact").passed


def test_an_older_artifact_survives_a_failed_export(
    small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = small_artifact[0], Path(shutil.copytree(small_artifact[1], tmp_path / "artifact"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_manifest", full)
    monkeypatch.setattr(onnx_artifact, "_write_graphs", lambda *_: {})
    with pytest.raises(OSError, match="No space left"):
        export.to_onnx(model, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_touched_decode_writes_only_what_a_token_selected(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    runner = export.load(folder)
    ids = tokens(3, 30)
    _, state = runner(ids[:, :10])
    assert isinstance(runner, export.OnnxRunner)
    if not runner.has_touched_decode:
        with pytest.raises(ValueError, match="touched must be False for this artifact, got True; it has no decode_tou"):
            runner.decode_loop(state, 3, touched=True)
        return
    whole, touched = (runner.decode_loop(state, 3, touched=choice) for choice in (False, True))
    for t in range(10, 30):
        expected = whole(ids[:, t].numpy())
        assert np.allclose(touched(ids[:, t].numpy()), expected, atol=1e-4)
    outputs = {value["name"]: value["shape"] for value in runner.manifest["io"]["decode_touched"]["outputs"]}
    assert outputs["present.0.touched_state"] == ["batch", 3 * 4, 8, 8]
    assert outputs["present.0.touched_conv_state"] == ["batch", 3 * 64, 3]
    assert outputs["present.0.touched_index"] == ["batch", 3]
    assert not any("recurrent_state" in name for name in outputs)


def test_a_decode_loop_refuses_a_graph_that_is_not_there(exported: tuple[MoMForCausalLM, Path]) -> None:
    runner = export.load(exported[1])
    assert isinstance(runner, export.OnnxRunner)
    with pytest.raises(ValueError, match="transposed must be False for this artifact, got True; it has no decode_cuda"):
        runner.decode_loop(runner.init_state(1), 1, transposed=True)


def test_a_token_takes_few_nodes(exported: tuple[MoMForCausalLM, Path]) -> None:
    """Each is a kernel to launch; what only renames axes is none, and what no input changes is computed once."""
    import onnx

    folder = exported[1]
    if export.load(folder).manifest["target"] != "onnxruntime":
        return
    for graph, limit in (("decode", 29), ("decode_touched", 33)):
        operators = launches(onnx.load(str(folder / f"{graph}.onnx"), load_external_data=False).graph)
        assert operators.count("SkipSimplifiedLayerNormalization") == 4
        # Beside the two layers: the embedding, the first norm and the logits.
        assert len(operators) <= 2 * limit + 3, sorted(operators)


def test_a_token_leaves_other_memories_bit_identical(exported: tuple[MoMForCausalLM, Path]) -> None:
    _, folder = exported
    runner = export.load(folder)
    _, before = runner(tokens(3, 30))
    _, after = runner(tokens(3, 1), before)
    for old, new in zip(before, after, strict=True):
        for name in old:
            written = (old[name] != new[name]).reshape(3, 5, -1).any(2)
            assert (written.sum(1) <= 3).all() and written[:, 4].all()


def test_messages(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"target must be one of onnxruntime, portable, opset27, got 'tflite'"):
        export.to_onnx(model, tmp_path / "x", target="tflite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="directory must be new, empty or an artifact"):
        export.to_onnx(model, tmp_path / "mine")
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer.json file"):
        export.to_onnx(model, tmp_path / "x", tokenizer=tmp_path / "none.json")
    assert not (tmp_path / "x").exists()
