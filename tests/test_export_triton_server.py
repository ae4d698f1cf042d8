"""The model repository for the Triton Inference Server: its configuration fits the graph, the graph the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, two_layers

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main


def parse(text: str) -> dict[str, Any]:
    """Protobuf's text format, as far as a model configuration uses it; a repeated field becomes a list."""
    words = re.findall(r'"[^"]*"|[\w.+-]+|[{}\[\]:,]', text)

    def value() -> Any:
        word = words.pop(0)
        if word == "{":
            return message("}")
        if word == "[":
            items = []
            while words[0] != "]":
                items.append(value())
                if words[0] == ",":
                    words.pop(0)
            words.pop(0)
            return items
        if word.startswith('"'):
            return word[1:-1]
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else word

    def message(end: str | None) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        while words and words[0] != end:
            name = words.pop(0)
            if words[0] == ":":
                words.pop(0)
            found = value()
            if name in fields:
                fields[name] = [*(fields[name] if isinstance(fields[name], list) else [fields[name]]), found]
            else:
                fields[name] = found
        if end is not None:
            words.pop(0)
        return fields

    return message(None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    model = two_layers("delta")
    root = tmp_path_factory.mktemp("triton")
    model.save_pretrained(root / "checkpoint")
    assert main(["export", str(root / "checkpoint"), str(root / "artifact"), "--to", "triton-server"]) == 0
    return model, root / "artifact"


def test_the_configuration_maps_every_state_of_the_graph(exported: tuple[MoMForCausalLM, Path]) -> None:
    onnx = pytest.importorskip("onnx")
    _, folder = exported
    config = parse((folder / "models" / "mom" / "config.pbtxt").read_text())
    graph = onnx.load(str(folder / "models" / "mom" / "1" / "model.onnx"), load_external_data=False).graph

    def described(values: Any) -> dict[str, tuple[str, list[int]]]:
        kinds = {1: "TYPE_FP32", 7: "TYPE_INT64"}
        return {
            value.name: (
                kinds[value.type.tensor_type.elem_type],
                [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim][1:],
            )
            for value in values
        }

    inputs, outputs = described(graph.input), described(graph.output)
    assert (config["name"], config["backend"]) == ("mom", "onnxruntime") and config["max_batch_size"] > 1
    (ids,), (logits,) = config["input"], config["output"]
    assert inputs.pop(ids["name"]) == (ids["data_type"], ids["dims"]) == ("TYPE_INT64", [-1])
    assert outputs.pop(logits["name"]) == (logits["data_type"], logits["dims"]) == ("TYPE_FP32", [-1, 257])
    states = config["sequence_batching"]["state"]
    assert len(states) == 4
    for state in states:
        assert state["output_name"] == state["input_name"].replace("past_key_values", "present")
        described_state = (state["data_type"], state["dims"])
        assert inputs.pop(state["input_name"]) == outputs.pop(state["output_name"]) == described_state
        start = state["initial_state"]
        assert (start["data_type"], start["dims"], start["zero_data"]) == (*described_state, "true")
    assert not inputs and not outputs  # nothing is left to the client


def test_the_folder(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    assert export.verify(folder, model).passed
    models = [path.relative_to(folder / "models").as_posix() for path in (folder / "models").rglob("*")]
    assert sorted(models) == ["mom", "mom/1", "mom/1/model.onnx", "mom/1/weights.bin", "mom/config.pbtxt"]
    readme = (folder / "README.md").read_text()
    # M' = 5 memories in 2 layers: 5 * 64 * 3 inputs of the convolution and 20 * 8 * 8 of the state.
    assert "tritonserver --model-repository=models" in readme and f"{2 * 4 * (960 + 1280) / 1024:.0f} KiB" in readme
    runner = export.load(folder)
    prompt = torch.randint(0, 256, (1, 70))
    steps = [int(x[0]) for x in runner.generate(prompt, 20, eos_token_id=-1)]
    assert steps == model.generate(prompt, 20, eos_token_id=-1)[0, 70:].tolist()


def test_states_of_float16(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    assert export.to_triton_server(model, tmp_path / "x", state_dtype="float16").passed
    config = parse((tmp_path / "x" / "models" / "mom" / "config.pbtxt").read_text())
    found = {
        state["input_name"].rpartition(".")[2]: (state["data_type"], state["initial_state"]["data_type"])
        for state in config["sequence_batching"]["state"]
    }
    assert found == {"conv_state": ("TYPE_FP32",) * 2, "recurrent_state": ("TYPE_FP16",) * 2}
    assert f"{(4 * 720 + 2 * 640) / 1024:.0f} KiB" in (tmp_path / "x" / "README.md").read_text()


def test_precisions_are_refused(
    exported: tuple[MoMForCausalLM, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(exported[1].parent / "checkpoint")
    for target in ("triton-server", "aoti"):
        assert main(["export", checkpoint, str(tmp_path / "x"), "--to", target, "--precision", "int8"]) == 2
        assert (
            f"--precision must go with --to onnxruntime or --to onnxruntime-cuda or --to tensorrt, got --to {target}"
            in capsys.readouterr().err
        )
