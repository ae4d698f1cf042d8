"""One graph, no recompiles, right states: the model under torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_model, tokens
from support import assert_close
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mom_compile import MoMForCausalLM
from mom_compile.ops import RULES


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def _bounds(documents: int, length: int) -> Tensor:
    cuts = torch.sort(torch.randint(0, length + 1, (documents - 1,))).values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([length])])


def _train_step(compiled: Callable[..., Any], model: MoMForCausalLM, **inputs: Tensor) -> Tensor:
    model.zero_grad()
    loss = compiled(inputs["input_ids"], labels=inputs["input_ids"], cu_seqlens=inputs.get("cu_seqlens")).loss
    loss.backward()
    return loss.detach()


def test_training_graph_serves_every_length_and_batch() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, length in [(2, 20), (3, 33)]:
        _train_step(compiled, model, input_ids=tokens(batch, length))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(20):
            ids = tokens(2 + step % 4, 7 + 11 * step)
            loss = _train_step(compiled, model, input_ids=ids)
            assert_close(loss, model(ids, labels=ids).loss.detach(), 1e-5, "loss")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_training_graph_serves_every_number_of_documents() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for documents, length in [(2, 40), (3, 66), (4, 91)]:
        _train_step(compiled, model, input_ids=tokens(1, length), cu_seqlens=_bounds(documents, length))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(20):
            length, documents = 50 + 7 * step, 2 + step % 5
            bounds = _bounds(documents, length)
            ids = tokens(1, length)
            loss = _train_step(compiled, model, input_ids=ids, cu_seqlens=bounds)
            assert_close(loss, model(ids, labels=ids, cu_seqlens=bounds).loss.detach(), 1e-5, "loss")
    assert not counters["graph_break"]


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_decode_carries_its_state(rule: str) -> None:
    model = tiny_model(rule, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 110)
    expected = model(ids)
    out = compiled(ids[:, :10])
    for t in range(10, 110):
        out = compiled(ids[:, t : t + 1], state=out.state)
        assert_close(out.logits, expected.logits[:, t : t + 1], 5e-5, f"token {t}")
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_inductor_forward_and_gradients() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    ids = tokens(2, 70)
    _train_step(model, model, input_ids=ids)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = _train_step(torch.compile(model, fullgraph=True), model, input_ids=ids)
    assert_close(loss, model(ids, labels=ids).loss.detach(), 1e-5, "loss")
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            assert_close(parameter.grad, expected[name], 1e-4, name)


def test_autocast_compiles() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = compiled(tokens(2, 30), return_logits=True, labels=tokens(2, 30))
    assert out.logits.dtype == torch.bfloat16 and out.router_logits[0].dtype == torch.float32
    out.loss.backward()


class _Exported(nn.Module):
    def __init__(self, model: MoMForCausalLM, form: str) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, input_ids: Tensor, state: tuple[dict[str, Tensor], ...]):  # type: ignore[no-untyped-def]
        out = self.model(input_ids, state=state, form=self.form)
        return out.logits, out.state


@torch.no_grad()
@pytest.mark.parametrize(("form", "rule"), [("packed", "gated_delta"), ("portable", "mamba2"), ("packed", "retention")])
def test_export_keeps_the_operators_whole(form: str, rule: str) -> None:
    model = tiny_model(rule, num_hidden_layers=1)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=4096)
    state = model(tokens(2, 9)).state
    shapes = ({0: batch, 1: length}, tuple({name: {0: batch} for name in layer} for layer in state))
    program = torch.export.export(
        _Exported(model, form),
        (tokens(2, 70), state),
        dynamic_shapes=shapes,
        strict=False,
        # conv1d compares strides for channels-last; the comparison always holds but cannot be proved.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    names = {str(node.target) for node in program.graph.nodes}
    expected = f"mom.chunk_{RULES[rule].op}.default" if form == "packed" else f"mom.recurrent_{RULES[rule].op}.default"
    assert expected in names and "mom.route.default" in names
    for b, t in [(1, 5), (3, 64), (2, 130)]:
        ids, start = tokens(b, t), model(tokens(b, 9)).state
        logits, after = program.module()(ids, start)
        direct = model(ids, state=start)
        assert_close(logits, direct.logits, 5e-5, f"logits at {b, t}")
        assert_close(after[0]["recurrent_state"], direct.state[0]["recurrent_state"], 5e-5, f"state at {b, t}")
