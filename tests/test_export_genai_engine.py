"""GenAI's engine: ragged requests, batched as they come and go, give what the model gives each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model

from mom_compile import MoMForCausalLM, export
from mom_compile.cli import main
from mom_compile.export import artifact
from mom_compile.export.genai_runner import GenaiRunner

LENGTHS = (70, 1, 13, 64)
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    model = tiny_model(["gated_delta", "retention"], vocab_size=257, eos_token_id=256)
    root = tmp_path_factory.mktemp("engine")
    model.save_pretrained(root / "model")
    assert main(["export", str(root / "model"), str(root / "x"), "--to", "genai", "--engine"]) == 0
    return model, root / "x"


def _open(folder: Path) -> GenaiRunner:
    runner = export.load(folder)
    assert isinstance(runner, GenaiRunner)
    return runner


def _expected(model: MoMForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """Greedy, up to the end of the text and with it."""
    text = model.generate(torch.tensor([prompt]), steps, eos_token_id=256)[0, len(prompt) :].tolist()
    return text[: text.index(256) + 1] if 256 in text else text


def _prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, 256, (length,)).tolist() for length in lengths]


def test_the_report_and_the_folder(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    manifest = artifact.read_manifest(folder)
    assert manifest["graphs"] == {"model": "model.onnx", "engine": "engine.onnx"}
    checks = {check["name"]: check for check in manifest["parity"]["checks"]}
    row = checks["engine, 6 requests"]
    assert row["passed"] and int(row["measured"].split()[0]) > 100
    assert [value["name"] for value in manifest["io"]["engine"]["inputs"][:4]] == [
        "input_ids",
        "cumulative_sequence_lengths",
        "past_sequence_lengths",
        "block_table",
    ]
    # One copy of the weights serves both graphs.
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (folder / "weights.bin").stat().st_size < 1.1 * weights + 256 * 1024


def test_ragged_requests(exported: tuple[MoMForCausalLM, Path]) -> None:
    model, folder = exported
    prompts = _prompts(*LENGTHS)
    texts = _open(folder).generate_requests(prompts, 40)
    assert texts == [_expected(model, prompt, 40) for prompt in prompts]


def test_more_requests_than_a_batch_and_a_common_beginning(exported: tuple[MoMForCausalLM, Path]) -> None:
    """20 requests where 16 run at once: places are taken over. Some begin alike over more than a page."""
    model, folder = exported
    runner, prefix = _open(folder), _prompts(300)[0]
    prompts = [prefix + prompt for prompt in _prompts(5, 9)] + _prompts(*range(1, 19))
    texts = runner.generate_requests(prompts, 9)
    assert texts == [_expected(model, prompt, 9) for prompt in prompts]
    assert runner.generate_requests(prompts[:1], 0) == [[]]


def test_a_request_that_comes_later(exported: tuple[MoMForCausalLM, Path]) -> None:
    """A prompt is read in the steps in which another request decodes, and takes over a place that became free."""
    import onnxruntime_genai as og

    model, folder = exported
    engine = _open(folder).engine()
    buffer = engine.create_event_buffer(1)
    prompts, limits = _prompts(30, 50, 20), (20, 4, 6)
    requests: list[Any] = []
    texts: list[list[int]] = []

    def begin() -> None:
        request = engine.create_request()
        options = og.TurnOptions(request)
        options.set_max_generated_tokens(limits[len(requests)])
        options.set_do_sample(False)
        request.begin_turn(np.array(prompts[len(requests)], np.int32), options)
        requests.append(request)
        texts.append([])

    begin()
    while engine.has_pending_requests():
        for event in engine.run(buffer):
            if event.flags & og.EngineEventFlags.TOKEN:
                texts[requests.index(event.request)].append(event.token)
            if event.flags & og.EngineEventFlags.TURN_FINISHED:
                event.request.close()
        if len(requests) < 3 and len(texts[0]) >= 5 * len(requests):
            begin()
    expected = [_expected(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert texts == [[token for token in text if token != 256] for text in expected]


@pytest.mark.slow
def test_a_layer_without_convolution(tmp_path: Path) -> None:
    model = tiny_model("mamba2", num_hidden_layers=1, use_short_conv=False, topk=1, vocab_size=257, eos_token_id=256)
    assert export.to_genai(model, tmp_path / "x", engine=True).passed


@pytest.mark.slow
def test_a_checkpoint_of_flash_linear_attention(tmp_path: Path) -> None:
    model = MoMForCausalLM.from_pretrained(DATA / "fla-mom-tiny")
    report = export.to_genai(model, tmp_path / "x", engine=True)
    assert next(check for check in report.checks if check.name.startswith("engine")).passed


def test_messages(exported: tuple[MoMForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = exported
    runner = _open(folder)
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, vocab_size = 257\), got 300"):
        runner.generate_requests([[65], [300]], 5)
    monkeypatch.delitem(runner.manifest["graphs"], "engine")
    with pytest.raises(ValueError, match="must hold the form for the engine, got none; export with --engine"):
        runner.generate_requests([[65]], 5)
    monkeypatch.setattr("onnxruntime_genai.__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"onnxruntime-genai must be at least 0\.18, got 0\.17\.1"):
        export.to_genai(model, tmp_path / "x", engine=True)
