"""Decode sessions give what the model gives, on buffers of their own."""

from __future__ import annotations

import pytest
import torch
from models import VARIANTS, tiny_config, tiny_model, tokens
from support import ON_GPU, assert_close

from mom_compile import MoMForCausalLM
from mom_compile.decode import DecodeSession, session_for
from mom_compile.ops import RULES

TOLERANCE = 2e-5


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_model(rule: str, variant: str) -> None:
    model = tiny_model(rule, **VARIANTS[variant])
    ids = tokens(3, 30)
    expected = model(ids)
    state = model(ids[:, :20]).state
    before = [{name: value.clone() for name, value in layer.items()} for layer in state]
    session = DecodeSession(model, 3)
    session.load(state)
    for t in range(20, 30):
        assert_close(session.step(ids[:, t]), expected.logits[:, t], TOLERANCE, f"logits of token {t}")
    for layer, (after, given, kept) in enumerate(zip(session.state(), state, before, strict=True)):
        for name, value in after.items():
            assert_close(value, expected.state[layer][name], TOLERANCE, name)
            assert torch.equal(given[name], kept[name])


@torch.no_grad()
def test_the_step_with_gradients_equals_the_operator() -> None:
    model = tiny_model()
    ids = tokens(2, 13)
    state = model(ids[:, :10]).state
    fused = model(ids[:, 10:], state=state, form="step")
    with torch.enable_grad():
        plain = model(ids[:, 10:], state=state, form="step")
    assert plain.logits.requires_grad
    assert_close(fused.logits, plain.logits.detach(), TOLERANCE, "logits")
    for a, b in zip(fused.state, plain.state, strict=True):
        for name in a:
            assert_close(a[name], b[name].detach(), TOLERANCE, name)


@torch.no_grad()
@pytest.mark.skipif(ON_GPU, reason="a graph serves the GPU")
def test_compiled() -> None:
    model = tiny_model()
    ids = tokens(2, 12)
    session = DecodeSession(model, 2, compile=True)
    session.load(model(ids[:, :8]).state)
    expected = model(ids)
    for t in range(8, 12):
        assert_close(session.step(ids[:, t]), expected.logits[:, t], TOLERANCE, f"logits of token {t}")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    # Every memory is selected: rounding cannot change the routing.
    model = tiny_model(topk=4).to(dtype)
    ids = tokens(2, 12)
    state = model(ids[:, :8]).state
    session = DecodeSession(model, 2, graph=False)
    session.load(state)
    for t in range(8, 12):
        out = model(ids[:, t : t + 1], state=state)
        state = out.state
        assert_close(session.step(ids[:, t]), out.logits[:, 0], 3e-2 if dtype == torch.bfloat16 else 1e-10, "logits")


def test_generate_with_a_session() -> None:
    model = tiny_model()
    ids = tokens(2, 9)
    expected = model.generate(ids, 12, eos_token_id=-1, decode=model)
    session = DecodeSession(model, 2)
    assert torch.equal(model.generate(ids, 12, eos_token_id=-1, session=session), expected)
    assert torch.equal(model.generate(ids, 12, eos_token_id=-1, session=session), expected)
    eos = int(expected[0, 12])
    expected = model.generate(ids, 12, eos_token_id=eos, decode=model)
    assert torch.equal(model.generate(ids, 12, eos_token_id=eos, session=session), expected)


@torch.no_grad()
def test_a_session_is_kept_until_the_model_changes() -> None:
    model = tiny_model()
    state = model.init_state(2)
    first = session_for(model, state)
    assert session_for(model, state) is first
    assert session_for(model, model.init_state(3)) is not first
    second = session_for(model, state)
    model.lm_head.weight.mul_(2)
    assert second.stale(model)
    assert session_for(model, state) is not second


def test_messages() -> None:
    model = tiny_model()
    session = DecodeSession(model, 2)
    other = MoMForCausalLM(tiny_config(num_memories=3))
    cases = [
        (lambda: DecodeSession(model, 0), "batch_size must be at least 1, got 0"),
        (lambda: session.load(model.init_state(3)), "must have shape .* got"),
        (lambda: session.load(other.init_state(2)), "must have shape .* got"),
        (lambda: session.load(model.init_state(2)[:1]), "state must have one entry for each of the 2 layers, got 1"),
        (
            lambda: session.load(model.init_state(2, dtype=torch.bfloat16)),
            "must have the session's dtype",
        ),
        (lambda: session.step(tokens(3, 1)[:, 0]), r"ids must be \[B\] = \(2,\), got shape \(3,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    model.model.layers.double()
    with pytest.raises(ValueError, match="model must have its own routers"):
        DecodeSession(model, 2)
