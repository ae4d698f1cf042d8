"""Bits per byte: carried, fresh and zeroed states, memory shares, and the n-gram baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import tiny_model
from torch.nn import functional as F

from mom_compile.data import TokenStream, tokenize
from mom_compile.evaluate import bits_per_byte, choice_counts, evaluate, shares
from mom_compile.ngram import ngram_bits_per_byte
from mom_compile.tokenizer import ByteTokenizer


def stream(length: int, vocab_size: int = 50) -> TokenStream:
    ids = np.random.default_rng(0).integers(0, vocab_size, length).astype(np.uint16)
    return TokenStream(ids, np.ones(length, np.uint8))


def test_one_row_is_the_loss_of_the_whole_text() -> None:
    model, text = tiny_model(), stream(101)
    ids = torch.from_numpy(text.ids.astype(np.int64))[None]
    expected = F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:]).item()
    for seq_len in (7, 40, 1000):
        result = evaluate(model, text, batch_size=1, seq_len=seq_len)
        assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
        assert result.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5)
        assert result.num_tokens == result.num_bytes == 100


def test_rows_of_unequal_length_count_every_target_once() -> None:
    model, text = tiny_model(), stream(102)
    ids = torch.from_numpy(text.ids.astype(np.int64))
    total = 0.0
    for start in range(0, 101, 26):  # 4 rows of 26, the last one shorter
        row = ids[start : min(start + 27, 102)]
        total += F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum").item()
    result = evaluate(model, text, batch_size=4, seq_len=10)
    assert result.num_tokens == 101 and result.nats_per_token == pytest.approx(total / 101, rel=1e-5)


def test_fresh_pieces_start_from_an_empty_state() -> None:
    model, text = tiny_model(), stream(41)
    ids = torch.from_numpy(text.ids.astype(np.int64))
    pieces = [ids[start : start + 11] for start in range(0, 40, 10)]
    expected = [F.cross_entropy(model(p[None, :-1]).logits[0], p[1:], reduction="sum").item() for p in pieces]
    result = evaluate(model, text, batch_size=1, seq_len=10, carry_state=False)
    assert result.nats_per_token == pytest.approx(sum(expected) / 40, rel=1e-5)


def test_zeroed_memories_lose_the_past_and_keep_the_convolution() -> None:
    model, text = tiny_model(), stream(41)
    ids = torch.from_numpy(text.ids.astype(np.int64))[None]
    state, total = None, 0.0
    for start in range(0, 40, 8):
        out = model(ids[:, start : start + 8], state=state)
        total += F.cross_entropy(out.logits[0], ids[0, start + 1 : start + 9], reduction="sum").item()
        state = [{**layer, "recurrent_state": torch.zeros_like(layer["recurrent_state"])} for layer in out.state]
    result = evaluate(model, text, batch_size=1, reset_every=8)
    assert result.nats_per_token == pytest.approx(total / 40, rel=1e-5)
    carried = evaluate(model, text, batch_size=1)
    assert abs(carried.nats_per_token - result.nats_per_token) > 1e-4
    assert evaluate(model, text, batch_size=1, reset_every=40).nats_per_token == pytest.approx(carried.nats_per_token)


def test_memory_shares() -> None:
    model, text = tiny_model(), stream(90)
    result = evaluate(model, text, batch_size=4, seq_len=16)
    assert len(result.memory_shares) == 2
    assert all(sum(layer) == pytest.approx(1) and len(layer) == 4 for layer in result.memory_shares)
    logits = torch.tensor([[[3.0, 2, 1], [1, 3, 2], [9, 0, 0]]])
    counts = choice_counts([logits], 2, torch.tensor([[True, True, False]]))
    assert counts.tolist() == [[1, 2, 1]] and shares(counts) == [[0.25, 0.5, 0.25]]
    assert choice_counts([], 2).shape == (0, 0)


def test_mode_and_bytes() -> None:
    model = tiny_model().train()
    text = TokenStream(stream(50).ids, np.full(50, 3, np.uint8))
    result = evaluate(model, text, max_tokens=20)
    assert model.training and result.num_bytes == 60
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2) / 3)
    assert math.isnan(bits_per_byte(1.0, 0))


def test_what_evaluation_refuses() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="stream must hold at least 2 tokens, got 1; hold out more text"):
        evaluate(model, stream(1))
    with pytest.raises(ValueError, match="stream must hold ids below vocab_size = 50, got"):
        evaluate(model, stream(90, 99))
    with pytest.raises(ValueError, match="reset_every must be at least 1, got 0"):
        evaluate(model, stream(9), reset_every=0)
    with pytest.raises(ValueError, match="reset_every must be None without carry_state, got both"):
        evaluate(model, stream(9), reset_every=4, carry_state=False)


def _witten_bell(train: str, held_out: str, order: int) -> float:
    """The definition, one target at a time."""

    def probability(history: str, token: str) -> float:
        if history is None:
            return 1 / 257
        lower = probability(history[1:] if history else None, token)  # type: ignore[arg-type]
        n = len(history)
        after = [train[i + n] for i in range(len(train) - n) if train[i : i + n] == history]
        if not after:
            return lower
        kinds = len(set(after))
        return (after.count(token) + kinds * lower) / (len(after) + kinds)

    bits = 0.0
    for i in range(1, len(held_out)):
        bits -= math.log2(probability(held_out[max(0, i - order + 1) : i], held_out[i]))
    return bits / (len(held_out) - 1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_baselines_follow_their_definition(order: int) -> None:
    train, held_out = "abracadabra abra cadabra", "cabra dabrx?"
    a, b = (tokenize([text], ByteTokenizer(), 0).train for text in (train, held_out))
    assert ngram_bits_per_byte(a, b, 257, order) == pytest.approx(_witten_bell(train, held_out, order), rel=1e-9)


def test_ngram_arguments() -> None:
    with pytest.raises(ValueError, match=r"order must lie in \[1, 3\], got 4; 2 is a bigram model"):
        ngram_bits_per_byte(stream(9), stream(9), 50, 4)
    with pytest.raises(ValueError, match="at least 2 held-out and 2 training tokens, got 1 and 9"):
        ngram_bits_per_byte(stream(9), stream(1), 50, 2)
