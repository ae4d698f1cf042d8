"""Interpolated n-gram models: what counting alone reaches, as a baseline for a trained model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .data import TokenStream


def ngram_bits_per_byte(train: TokenStream, held_out: TokenStream, vocab_size: int, order: int) -> float:
    """Bits per byte of a Witten-Bell interpolated n-gram model.

    ``p_n(c | h) = (count(h c) + T(h) p_{n-1}(c | h')) / (count(h) + T(h))``, T(h) the number of different tokens seen
    after the history h, h' the history without its oldest token, p_0 uniform; unseen histories fall through to h'.

    Args:
        train: what is counted.
        held_out: at least two tokens; all but the first are predicted, as :func:`mom_compile.evaluate.evaluate` does.
        vocab_size: entries of the vocabulary.
        order: 1 unigram, 2 bigram, 3 trigram.

    Raises:
        ValueError: ``order`` out of range, or too little text.

    Source: Chen and Goodman, An empirical study of smoothing techniques (1998), section 2.5.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order must lie in [1, 3], got {order}; 2 is a bigram model")
    if len(held_out) < 2 or len(train) < order:
        raise ValueError(
            f"text must hold at least 2 held-out and {order} training tokens, got {len(held_out)} and {len(train)}; "
            "pass more text"
        )
    seen, new = train.ids.astype(np.int64), held_out.ids.astype(np.int64)
    targets = len(new) - 1
    probability = np.full(targets, 1 / vocab_size)
    for length in range(1, order + 1):
        # The first targets have shorter histories than the model: they keep the shorter model's probability.
        known = slice(max(length - 2, 0), None)
        grams, histories = _codes(seen, length, vocab_size)
        counts = _Counts(grams)
        history_counts = _Counts(histories)
        kinds = _Counts(counts.keys // vocab_size)
        wanted, contexts = _codes(new if length > 1 else new[1:], length, vocab_size)
        together, before, different = counts(wanted), history_counts(contexts), kinds(contexts)
        total = before + different
        lower = probability[known]
        probability[known] = np.where(total > 0, (together + different * lower) / np.maximum(total, 1), lower)
    bits = -np.log2(probability).sum()
    return float(bits / held_out.token_bytes[1:].sum(dtype=np.int64))


def _codes(ids: NDArray[np.int64], length: int, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every n-gram of the ids as one number, and its history as another."""
    count = len(ids) - length + 1
    code = np.zeros(max(count, 0), np.int64)
    for offset in range(length):
        code = code * vocab_size + ids[offset : offset + count]
    return code, code // vocab_size


class _Counts:
    """How often each number occurs."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self.keys, self.counts = np.unique(values, return_counts=True)

    def __call__(self, wanted: NDArray[np.int64]) -> NDArray[np.float64]:
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.counts[place], 0).astype(np.float64)
