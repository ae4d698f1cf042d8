"""Graphs of a kernel pack's functions equal the model, their nodes' kernels interpreted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VARIANTS, tiny_model
from support import INTERPRET, assert_close

from mom_compile import MoMForCausalLM
from mom_compile.export.kernel_function import Dtypes
from mom_compile.export.kernel_graphs import check_alignment, write_graphs

pytest.importorskip("triton")
pytest.importorskip("onnx_ir")
if not INTERPRET:
    pytest.skip("runs the kernels on the CPU: TRITON_INTERPRET=1", allow_module_level=True)

from kernel_graph_evaluator import Evaluator

FLOAT32 = Dtypes(torch.float32, torch.float32)
ARCHITECTURE = 90
LONG = (5, 66)
"""Sequences of a token, more than a product takes at once, and tokens of a prefill, more than a chunk."""
SHORT = (2, 5)
CASES = [
    ("gated_delta", "default", {}, LONG),
    ("gated_delta", "gva-all-memories", {}, SHORT),
    ("mamba2", "single-kv-no-conv", {}, SHORT),
    ("retention", "no-shared", {"num_memories": 3}, SHORT),
    ("linear", "one-memory", {"tie_word_embeddings": True}, SHORT),
]


def _model(rule: str, variant: str, changes: dict[str, Any]) -> MoMForCausalLM:
    model = tiny_model(rule, **{"num_hidden_layers": 1, **VARIANTS[variant], **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def _run(evaluator: Evaluator, ids: torch.Tensor, state: Any, **inputs: Any) -> tuple[torch.Tensor, Any]:
    feeds = {"input_ids": ids.numpy(), **inputs}
    for index, layer in enumerate(state):
        for name, value in layer.items():
            feeds[f"past_key_values.{index}.{name}"] = value.flatten(1, 2).numpy()
    found = evaluator(feeds)
    after = [
        {name: torch.from_numpy(found[f"present.{index}.{name}"]).view_as(value) for name, value in layer.items()}
        for index, layer in enumerate(state)
    ]
    return torch.from_numpy(found["logits"]), after


def _random_state(model: MoMForCausalLM, batch: int) -> Any:
    return [{name: 0.1 * torch.randn_like(x) for name, x in layer.items()} for layer in model.init_state(batch)]


@pytest.mark.parametrize(("rule", "variant", "changes", "sizes"), CASES)
def test_graphs_equal_the_model(
    rule: str, variant: str, changes: dict[str, Any], sizes: tuple[int, int], tmp_path: Path
) -> None:
    model = _model(rule, variant, changes)
    config = model.config
    runs = [("decode", sizes[0], 1), ("prefill", 2, sizes[1]), *([("prefill_forced", 1, 3)] if sizes == LONG else [])]
    io, _ = write_graphs(model, tmp_path, FLOAT32, ARCHITECTURE, [name for name, *_ in runs])
    assert {name for name in io["decode"]["operators"] if "mom::" not in name} <= {"Gather", "Reshape"}

    for name, batch, length in runs:
        evaluator = Evaluator(tmp_path / f"{name}.onnx", config, FLOAT32, ARCHITECTURE)
        ids, state, given = torch.randint(0, 50, (batch, length)), _random_state(model, batch), None
        inputs = {}
        if name == "prefill_forced":
            shape = (batch, length, config.num_memories)
            given = [torch.rand(shape).argsort(-1)[..., : config.topk] for _ in model.model.layers]
            inputs = {f"router_indices.{index}": choice.numpy() for index, choice in enumerate(given)}
        with torch.no_grad():
            expected = model(ids, state=state, router_indices=given)
        logits, after = _run(evaluator, ids, state, **inputs)
        assert_close(logits, expected.logits, 2e-5, f"{name} logits")
        for ours, theirs in zip(after, expected.state, strict=True):
            for key, value in theirs.items():
                assert_close(ours[key], value, 2e-5, f"{name} {key}")


def test_a_conversation_goes_from_prefill_to_decode(tmp_path: Path) -> None:
    model = _model("delta", "default", {"num_hidden_layers": 2, "use_output_gate": False})
    write_graphs(model, tmp_path, FLOAT32, ARCHITECTURE, ("decode", "prefill"))
    prefill, decode = (
        Evaluator(tmp_path / f"{name}.onnx", model.config, FLOAT32, 90) for name in ("prefill", "decode")
    )
    ids = torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        expected = model(ids).logits
    logits, state = _run(prefill, ids[:, :5], model.init_state(1))
    pieces = [logits]
    for t in range(5, 7):
        logits, state = _run(decode, ids[:, t : t + 1], state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), expected, 2e-5, "logits")


def test_both_graphs_share_their_weights(tmp_path: Path) -> None:
    model = _model("gated_delta", "default", {})
    _, common = write_graphs(model, tmp_path, FLOAT32, ARCHITECTURE, ("decode", "prefill", "prefill_forced"))
    whole = sum(4 * math.prod(weight["shape"]) for weight in common)
    assert whole >= 0.75 * sum(p.numel() * 4 for p in model.parameters())
    file = np.fromfile(tmp_path / "weights.bin", np.uint8)
    (weight,) = (weight for weight in common if weight["name"] == "lm_head")
    first = file[weight["offset"] :][: 4 * math.prod(weight["shape"])].view(np.float32).reshape(weight["shape"])
    np.testing.assert_array_equal(first, model.lm_head.weight.detach().numpy())
    size = (tmp_path / "weights.bin").stat().st_size
    assert size <= 1.15 * sum(p.numel() * 4 for p in model.parameters())  # tiny: every part is padded to 64 bytes


def test_parts_off_the_alignment_are_refused() -> None:
    config = tiny_model("gated_delta", num_heads=1, head_dim=6).config
    with pytest.raises(ValueError, match=r"num_heads \* head_dim must be a multiple of 8 .* got 6; use"):
        check_alignment(config, Dtypes(torch.float16, torch.float32))
