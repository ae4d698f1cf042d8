"""GenAI artifacts: opened and run by onnxruntime-genai itself; ragged batches, shared buffers, beams refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import artifact, genai_runner
from mom_compile.export.genai_runner import GenaiRunner
from mom_compile.export.structure import late_reader

LENGTHS = (70, 13, 40)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    model = tiny_model(["gated_delta", "retention"], vocab_size=257, eos_token_id=256)
    folder = tmp_path_factory.mktemp("genai") / "artifact"
    export.to_genai(model, folder)
    return model, folder


@pytest.fixture
def runner(exported: tuple[MoMForCausalLM, Path]) -> GenaiRunner:
    loaded = export.load(exported[1])
    assert isinstance(loaded, GenaiRunner)
    return loaded


def _ragged() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (len(LENGTHS), max(LENGTHS)))
    return ids, (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def _until_end(tokens: list[int], end: int = 256) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_the_report_and_the_manifest(exported: tuple[MoMForCausalLM, Path]) -> None:
    manifest = json.loads((exported[1] / "manifest.json").read_text())
    assert manifest["kind"] == "genai" and manifest["parity"]["passed"] and manifest["parity"]["error"] < 1e-5
    names = {check["name"] for check in manifest["parity"]["checks"]}
    assert {"ragged batch, logits", "ragged batch, states", "snapshot and rewind", "greedy text"} <= names
    assert "64 decode steps, past and present in one buffer" in names
    inputs = manifest["io"]["model"]["inputs"]
    assert [value["name"] for value in inputs[:3]] == ["input_ids", "attention_mask", "past_key_values.0.conv_state"]
    assert manifest["versions"]["onnxruntime-genai"]
    assert manifest["io"]["model"]["operators"]["com.microsoft::LinearAttention"] == 2


@pytest.mark.parametrize("shared", [False, True])
def test_ragged_prompts_generate_the_models_tokens(
    exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner, shared: bool
) -> None:
    """GenAI's own loop, with past and present in one buffer as well."""
    import onnxruntime_genai as og

    model, _ = exported
    ids, mask = _ragged()
    params = og.GeneratorParams(runner.model)
    params.set_search_options(
        max_length=100, batch_size=len(LENGTHS), do_sample=False, past_present_share_buffer=shared
    )
    generator = og.Generator(runner.model, params)
    generator.append_tokens(torch.where(mask == 1, ids, 256).int().numpy())
    while not generator.is_done():
        generator.generate_next_token()
    for row, length in enumerate(LENGTHS):
        expected = model.generate(ids[row : row + 1, :length], 30)[0, length:].tolist()
        actual = [int(token) for token in generator.get_sequence(row)][max(LENGTHS) :]
        assert _until_end(actual) == _until_end(expected)


def test_the_runner_generates(exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner) -> None:
    model, _ = exported
    ids, mask = _ragged()
    steps = np.stack(list(runner.generate(ids, 30, attention_mask=mask)), 1)
    expected = model.generate(ids, 30, attention_mask=mask)[:, ids.shape[1] :].numpy()
    assert np.array_equal(steps, expected[:, : steps.shape[1]])
    drawn = [[int(token[0]) for token in runner.generate([[65]], 20, temperature=1.0, seed=seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(runner.generate([[65]], 0)) == []


def test_padding_on_either_side(exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner) -> None:
    model, _ = exported
    ids = torch.randint(0, 256, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    mask[1, 66:] = 0
    with torch.no_grad():
        start = model(torch.randint(0, 256, (2, 5))).state
        out = model(ids, state=start, attention_mask=mask)
    logits, state = runner.run_masked(ids, mask, start)
    use = mask.bool()
    assert torch.allclose(torch.from_numpy(logits)[use], out.logits[use], atol=1e-4)
    for layer, values in enumerate(out.state):
        for name, value in values.items():
            assert np.allclose(state[layer][name], value.numpy(), atol=1e-5)


def test_one_conversation_through_every_engine(
    exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner, tmp_path: Path
) -> None:
    model, _ = exported
    export.to_pt2(model, tmp_path / "pt2")
    ids = torch.randint(0, 256, (2, 120))
    with torch.no_grad():
        expected = model(ids).logits
        state = model(ids[:, :50]).state
    one, state = export.load(tmp_path / "pt2")(ids[:, 50:51], state)
    two, state = runner(ids[:, 51:], state)
    assert torch.allclose(one, expected[:, 50:51], atol=1e-4)
    assert np.allclose(two, expected[:, 51:].numpy(), atol=1e-4)


def test_text(exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner, capsys: pytest.CaptureFixture[str]) -> None:
    """The byte vocabulary as GenAI's own tokenizer reads it."""
    import onnxruntime_genai as og

    tokenizer = og.Tokenizer(runner.model)
    for text in ("The cat. ", "  two\nlines\t é 漢字 🙂"):
        ids = [int(token) for token in tokenizer.encode(text)]
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert main(["generate", str(exported[1]), "--greedy", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.slow
def test_a_layer_without_convolution(tmp_path: Path) -> None:
    """GenAI finds its layers by a conv_state: a dummy goes through."""
    model = tiny_model(num_hidden_layers=1, use_short_conv=False, topk=1, vocab_size=50)
    assert export.to_genai(model, tmp_path / "x").passed
    names = [value["name"] for value in artifact.read_manifest(tmp_path / "x")["io"]["model"]["inputs"]]
    assert names[2:] == ["past_key_values.0.conv_state", "past_key_values.0.recurrent_state"]
    assert set(export.load(tmp_path / "x").init_state(1)[0]) == {"recurrent_state"}


@pytest.mark.slow
def test_states_of_float16(tmp_path: Path) -> None:
    """GenAI keeps them in float16 as well: its loop gives the tokens of ours over the same graph."""
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    report = export.to_genai(model, tmp_path / "x", state_dtype="float16")
    assert {"prefill logits", "ragged batch, states", "64 decode steps with the same routing"} <= {
        check.name for check in report.checks
    }
    runner = export.load(tmp_path / "x")
    assert runner.init_state(1)[0]["recurrent_state"].dtype == np.float16
    prompt = np.arange(20)[None] * 7 % 256
    logits, state = runner(prompt)
    step, token, expected = runner.decode_loop(state, 1), logits[:, -1].argmax(-1), []
    for _ in range(40):
        expected.append(int(token[0]))
        token = step(token).argmax(-1)
    assert _until_end([int(x[0]) for x in runner.generate(prompt, 40)]) == _until_end(expected)


def test_messages(exported: tuple[MoMForCausalLM, Path], runner: GenaiRunner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_beams must be 1, got 4; GenAI's beam search does not reorder"):
        runner.generate([[65]], 5, num_beams=4)
    with pytest.raises(ValueError, match="num_beams must be 1, got 2"):
        runner.generator(1, 10, num_beams=2)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \(1, 3\) with padding on the right alone"):
        runner.generate([[65, 66, 67]], 5, attention_mask=[[0, 1, 1]])
    with pytest.raises(ValueError, match="input_ids must not hold the pad token 256 in a batch of 2"):
        runner.generate([[65, 256], [65, 66]], 5)
    with pytest.raises(ValueError, match="eos_token_id must be 256 as in genai_config.json, got 3"):
        runner.generate([[65]], 5, eos_token_id=3)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids \(1, 2\), got \(1, 3\)"):
        runner.run_masked([[65, 66]], [[1, 1, 1]])
    folder = Path(shutil.copytree(exported[1], tmp_path / "x"))
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["num_beams"] = 3
    (folder / "genai_config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    artifact.write_manifest(folder, manifest)
    with pytest.raises(ValueError, match="num_beams must be 1, got 3"):
        export.load(folder)


def test_an_old_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime_genai

    monkeypatch.setattr(onnxruntime_genai, "__version__", "0.9.1")
    with pytest.raises(ImportError, match=r"onnxruntime-genai must be at least 0\.15, got 0\.9\.1; run: pip install"):
        genai_runner.require_genai()


def test_a_late_reader_is_found() -> None:
    """Reading the past beside the node that writes the present is legal in ONNX, and wrong in one buffer."""
    from onnx import TensorProto, helper

    def graph(*nodes: Any) -> Any:
        def values(*names: str) -> list[Any]:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in names]

        return helper.make_graph(nodes, "g", values("past_key_values.0.s", "x"), values("present.0.s", "logits"))

    write = helper.make_node("Add", ["past_key_values.0.s", "x"], ["present.0.s"], name="write")
    view = helper.make_node("Reshape", ["past_key_values.0.s", "x"], ["v"], name="view")
    assert late_reader(graph(write, helper.make_node("Neg", ["present.0.s"], ["logits"]))) is None
    late = helper.make_node("Neg", ["past_key_values.0.s"], ["logits"], name="late")
    assert late_reader(graph(write, late)) == "Neg late beside the writer of present.0.s"
    behind = helper.make_node("Neg", ["v"], ["logits"], name="behind")
    assert late_reader(graph(view, write, behind)) == "Reshape view beside the writer of present.0.s"
    shape = helper.make_node("Shape", ["past_key_values.0.s"], ["logits"], name="shape")
    assert late_reader(graph(write, shape)) is None  # it reads no values
    early = helper.make_node("Neg", ["past_key_values.0.s"], ["logits"], name="early")
    after = helper.make_node("Add", ["past_key_values.0.s", "logits"], ["present.0.s"], name="write")
    assert late_reader(graph(early, after)) is None
