"""Decode sessions give what the model gives, on buffers of their own."""

from __future__ import annotations

import pytest
import torch
from models import VARIANTS, tiny_config, tiny_model, tokens
from support import ON_GPU, assert_close

from mom_compile import MoMForCausalLM
from mom_compile.decode import DecodeSession, has_compiler, session_for
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
def test_512_steps_equal_one_pass() -> None:
    model = tiny_model()
    ids = tokens(2, 40 + 512)
    expected = model(ids)
    session = DecodeSession(model, 2)
    session.load(model(ids[:, :40]).state)
    logits = torch.stack([session.step(ids[:, t]).clone() for t in range(40, ids.shape[1])], 1)
    assert_close(logits, expected.logits[:, 40:], TOLERANCE, "logits")
    for after, wanted in zip(session.state(), expected.state, strict=True):
        for name, value in after.items():
            assert_close(value, wanted[name], TOLERANCE, name)


@torch.no_grad()
def test_a_step_touches_the_selected_memories_alone() -> None:
    model = tiny_model(topk=1)
    session = DecodeSession(model, 2)
    session.load(model(tokens(2, 30)).state)
    for ids in tokens(10, 2):
        before = session.state()
        session.step(ids)
        for old, new in zip(before, session.state(), strict=True):
            for name, value in new.items():
                same = (value == old[name]).flatten(2).all(2)
                assert (same.sum(1) == 3).all() and not same[:, -1].any(), name  # one routed, and the shared one


@torch.no_grad()
def test_roll_back() -> None:
    """A state is a saved point: the same tokens from it give the same logits, bit for bit."""
    model = tiny_model()
    session, ids = DecodeSession(model, 2), tokens(12, 2)
    for t in range(4):
        session.step(ids[t])
    point = session.state()
    first = [session.step(ids[t]).clone() for t in range(4, 8)]
    for t in range(8, 12):
        session.step(ids[t])
    session.load(point)
    assert all(torch.equal(session.step(ids[t]), first[t - 4]) for t in range(4, 8))


@torch.no_grad()
@pytest.mark.skipif(ON_GPU, reason="a graph serves the GPU")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("nowhere")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    has_compiler.cache_clear()
    model = tiny_model()
    with pytest.warns(UserWarning, match="decoding stays eager: torch.compile finds no C.. compiler .nowhere."):
        session = DecodeSession(model, 2, compile=True)
    DecodeSession(model, 2, compile=True)  # says it once: a warning would fail
    has_compiler.cache_clear()
    assert not session.compiled
    ids = tokens(2, 1)[:, 0]
    assert torch.equal(session.step(ids), DecodeSession(model, 2).step(ids))


@torch.no_grad()
@pytest.mark.skipif(ON_GPU, reason="a graph serves the GPU")
def test_compiled() -> None:
    model = tiny_model()
    ids = tokens(2, 12)
    session = DecodeSession(model, 2, compile=True)
    assert session.compiled
    state = model(ids[:, :8]).state
    session.load(state)
    expected = model(ids)
    for t in range(8, 12):
        with torch._dynamo.config.patch(error_on_recompile=t > 8):
            assert_close(session.step(ids[:, t]), expected.logits[:, t], TOLERANCE, f"logits of token {t}")
    for after, wanted in zip(session.state(), expected.state, strict=True):
        assert_close(after["recurrent_state"], wanted["recurrent_state"], TOLERANCE, "recurrent_state")


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
        (
            lambda: session.load([{k: v.to("meta") for k, v in layer.items()} for layer in model.init_state(2)]),
            "must lie on .*, got meta; move it",
        ),
        (lambda: session.step(tokens(3, 1)[:, 0]), r"ids must be \[B\] = \(2,\), got shape \(3,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    model.model.layers.double()
    with pytest.raises(ValueError, match="model must have its own routers"):
        DecodeSession(model, 2)
