from __future__ import annotations

import pytest
import torch
from models import tiny_model, tokens

from mom_compile.decode import DecodeSession
from mom_compile.generate import sample
from mom_compile.validate import validate_inputs


@torch.no_grad()
def test_greedy_equals_running_the_whole_text_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mom_compile.generate.PREFILL_TOKENS", 7)
    model = tiny_model()
    ids = tokens(2, 20)
    text = ids
    for _ in range(12):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    seen: list[torch.Tensor] = []
    out = model.generate(ids, 12, eos_token_id=-1, on_token=seen.append)
    assert torch.equal(out, text)
    assert torch.equal(torch.stack(seen, 1), out[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(side: str) -> None:
    model = tiny_model()
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    part = slice(0, 5) if side == "left" else slice(7, 12)
    mask[0, part] = 0
    out = model.generate(ids, 8, attention_mask=mask, eos_token_id=-1)
    alone = model.generate(ids[:1, 5:] if side == "left" else ids[:1, :7], 8, eos_token_id=-1)
    assert torch.equal(out[0, 12:], alone[0, 7:])
    assert torch.equal(out[1, 12:], model.generate(ids[1:], 8, eos_token_id=-1)[0, 12:])


@torch.no_grad()
def test_prefill_takes_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mom_compile.generate.PREFILL_TOKENS", 24)
    model = tiny_model()
    ids, seen, projected = tokens(3, 50), [], []
    hooks = [
        model.model.embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel())),
        model.lm_head.register_forward_pre_hook(lambda _, args: projected.append(tuple(args[0].shape[:-1]))),
    ]
    out = model.generate(ids, 1, eos_token_id=-1)
    for hook in hooks:
        hook.remove()
    assert max(seen) == 24 and len(seen) == 7
    assert projected == [(3,)]  # the logits of the other tokens are never computed
    assert torch.equal(out[:, 50], model(ids).logits[:, -1].argmax(-1))


def test_rows_stop_at_eos() -> None:
    model = tiny_model()
    ids = tokens(3, 6)
    free = model.generate(ids, 10, eos_token_id=-1)[:, 6:]
    eos = int(free[0, 3])
    out = model.generate(ids, 10, eos_token_id=eos)[:, 6:]
    for row in range(3):
        hits = (free[row] == eos).nonzero()
        stop = int(hits[0]) if len(hits) else 10
        assert torch.equal(out[row, : min(stop, out.shape[1])], free[row, : min(stop, out.shape[1])])
        assert (out[row, stop:] == eos).all()


def test_sampling_is_seeded() -> None:
    model = tiny_model()
    ids = tokens(1, 6)
    options = {"temperature": 0.9, "top_p": 0.8, "eos_token_id": -1}
    first = model.generate(ids, 20, seed=3, **options)
    assert torch.equal(first, model.generate(ids, 20, seed=3, **options))
    assert not torch.equal(first, model.generate(ids, 20, seed=4, **options))


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    drawn = sample(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    share = (drawn == 0).float().mean().item()
    assert abs(share - 0.625) < 0.03
    assert sample(torch.zeros(2, 5), 0, 1.0, None).tolist() == [0, 0]


def test_messages() -> None:
    model = tiny_model()
    ids = tokens(2, 5)
    assert torch.equal(model.generate(ids, 0), ids)
    cases = [
        (lambda: model.generate(ids, -1), "max_new_tokens must be at least 0, got -1"),
        (lambda: model.generate(ids, 1, temperature=-1), "temperature must be at least 0, got -1"),
        (lambda: model.generate(ids, 1, top_p=0), r"top_p must lie in \(0, 1\], got 0"),
        (lambda: model.generate(ids[:, :0], 1), "input_ids must hold at least one token, got an empty prompt"),
        (
            lambda: model.generate(ids, 2, state=tiny_model(num_memories=3).init_state(2)),
            r"state\[0\]\['conv_state'\] must have shape",
        ),
        (
            lambda: model.generate(ids, 2, state=model.init_state(3)),
            r"state\[0\]\['conv_state'\] must have shape \(2, .* got \(3, ",
        ),
        (
            lambda: model.generate(ids, 2, state=[{k: v.int() for k, v in x.items()} for x in model.init_state(2)]),
            r"state\[0\]\['conv_state'\] must have one of the dtypes",
        ),
        (
            lambda: model.generate(
                ids, 2, state=[{k: v.to("meta") for k, v in x.items()} for x in model.init_state(2)]
            ),
            r"state\[0\]\['conv_state'\] must lie on .*, got meta",
        ),
        (lambda: model.generate(ids, 2, session=DecodeSession(model, 3)), "must have shape .* got"),
        (lambda: model.generate(ids + 100, 1), r"input_ids must lie in \[0, vocab_size = 50\), got 1\d\d at position"),
        (
            lambda: validate_inputs(model.config, ids, torch.tensor([[1, 0, 1, 1, 1]] * 2)),
            "one run of ones .* got 2 in",
        ),
        (lambda: validate_inputs(model.config, ids, torch.zeros(2, 5)), "one run of ones in every row, got 0 in row 0"),
        (lambda: validate_inputs(model.config, ids, torch.full((2, 5), 3)), "must hold zeros and ones"),
        (lambda: validate_inputs(model.config, ids[:1], None, torch.tensor([0, 4])), "cu_seqlens must rise from 0"),
        (lambda: validate_inputs(model.config, ids, labels=ids - 60), r"labels must lie in \[0, vocab_size = 50\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
