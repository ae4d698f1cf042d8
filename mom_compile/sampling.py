"""Sampling from numpy logits, for runtimes without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sample(
    logits: NDArray[np.float32], temperature: float, top_p: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw a token id per row.

    Args:
        logits: ``[B, vocab_size]``.
        temperature: 0 takes the most probable token (ties: the lowest id).
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        generator: source of randomness.

    Returns:
        ``[B]`` int64.

    Source: nucleus sampling (arXiv 1904.09751) section 3.1.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-probability, axis=-1, kind="stable")
        ordered = np.take_along_axis(probability, order, -1)
        ordered[np.cumsum(ordered, -1) - ordered >= top_p] = 0
        np.put_along_axis(probability, order, ordered, -1)
        probability /= probability.sum(-1, keepdims=True)
    cumulative = probability.cumsum(-1)
    drawn = generator.random((len(logits), 1)) * cumulative[:, -1:]
    return (cumulative <= drawn).sum(-1).clip(max=logits.shape[-1] - 1)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise unless the sampling options are in range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}; pass how many tokens to add")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}; 0 is greedy, 1 leaves the logits")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}; 1 keeps every token")
