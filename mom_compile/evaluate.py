"""Bits per byte of a model on held-out text, and what its recurrent state is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import TokenStream
from .model import MoMForCausalLM
from .ops import route
from .state import State

_NO_TARGET = -100


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        bits_per_byte: of the text that the targets stand for.
        nats_per_token: mean cross entropy.
        num_tokens: targets. num_bytes: what they stand for.
        memory_shares: per layer, the share of all choices that each routed memory takes; a layer's sum to 1.
    """

    bits_per_byte: float
    nats_per_token: float
    num_tokens: int
    num_bytes: int
    memory_shares: list[list[float]]


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Total nats of a text as bits per byte of it; NaN for no bytes."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan


def choice_counts(router_logits: Sequence[Tensor], topk: int, mask: Tensor | None = None) -> Tensor:
    """How many of the router's choices fall on each memory.

    Args:
        router_logits: per layer ``[B, T, M]``, as in ``MoMOutput``.
        topk: k.
        mask: ``[B, T]`` bool, False where a token does not count.

    Returns:
        ``[L, M]`` int64.
    """
    if not router_logits:
        return torch.zeros(0, 0, dtype=torch.int64)
    logits = torch.stack([layer.detach().float() for layer in router_logits])  # [L, B, T, M]
    layers, memories = logits.shape[0], logits.shape[-1]
    chosen = F.one_hot(route(logits.flatten(0, 2), topk)[1], memories).sum(1).view(layers, -1, memories)
    if mask is not None:
        chosen = chosen * mask.flatten().unsqueeze(1)
    return chosen.sum(1)


def shares(counts: Tensor) -> list[list[float]]:
    """:func:`choice_counts` as shares of each layer's choices."""
    return (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).tolist()


@torch.no_grad()
def evaluate(
    model: MoMForCausalLM,
    stream: TokenStream,
    *,
    batch_size: int = 16,
    seq_len: int = 256,
    carry_state: bool = True,
    reset_every: int | None = None,
    max_tokens: int | None = None,
) -> Evaluation:
    """Predict every token of a stream but its first.

    The stream is cut into ``batch_size`` rows of equal length that run side by side, in pieces of ``seq_len`` tokens.
    Whatever the options, the targets and the cuts into rows are the same, so results compare token by token.

    Args:
        model: run eagerly, in eval mode, on its own device.
        stream: at least two tokens.
        batch_size: rows; each starts from an empty state.
        seq_len: tokens of one call.
        carry_state: pieces of a row go on from the state of the one before; False starts each piece afresh.
        reset_every: zero ``recurrent_state`` (the memories) at the start of each ``reset_every`` tokens of a row, while
            ``conv_state`` carries on: what is lost is what the memories held of the tokens before. None: never.
        max_tokens: judge on no more than this many tokens from the start; None: on all.

    Raises:
        ValueError: too few tokens, an option out of range, ids beyond the model's vocabulary.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("reset_every", reset_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; leave it out for the default")
    if reset_every is not None and not carry_state:
        raise ValueError("reset_every must be None without carry_state, got both; seq_len alone sets the pieces then")
    ids = stream.ids if max_tokens is None else stream.ids[: max_tokens + 1]
    if len(ids) < 2:
        raise ValueError(f"stream must hold at least 2 tokens, got {len(ids)}; hold out more text")
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"stream must hold ids below vocab_size = {model.config.vocab_size}, got {int(ids.max())}; "
            "the text was tokenized for another model"
        )
    inputs, targets = rows(ids.astype(np.int64), batch_size)
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counts: Tensor | None = None
    state: State | None = None
    was_training = model.training
    model.eval()
    try:
        # A trainer's blocks are compiled; a graph for every length here would take longer to make than to run.
        with torch.compiler.set_stance("force_eager"):
            piece = seq_len if reset_every is None else reset_every
            for start in range(0, inputs.shape[1], piece):
                x = inputs[:, start : start + piece].to(device)
                y = targets[:, start : start + piece].to(device)
                out = model(x, state=state)
                assert out.logits is not None
                loss = F.cross_entropy(
                    out.logits.flatten(0, 1).float(), y.flatten(), ignore_index=_NO_TARGET, reduction="none"
                )
                nats += loss.double().sum()
                new = choice_counts(out.router_logits, model.config.topk, y != _NO_TARGET)
                counts = new if counts is None else counts + new
                state = _next_state(out.state, reset_every is not None) if carry_state else None
    finally:
        model.train(was_training)
    assert counts is not None
    total = nats.item()
    num_bytes = int(stream.token_bytes[1 : len(ids)].sum(dtype=np.int64))
    return Evaluation(
        bits_per_byte(total, num_bytes), total / (len(ids) - 1), len(ids) - 1, num_bytes, shares(counts.cpu())
    )


def rows(ids: np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[B, T]``; the last row is filled up with tokens whose target is negative: none."""
    count = len(ids) - 1
    rows = min(batch_size, count)
    length = -(-count // rows)
    rows = -(-count // length)
    inputs = torch.zeros(rows * length, dtype=torch.int64)
    targets = torch.full_like(inputs, _NO_TARGET)
    inputs[:count] = torch.from_numpy(ids[:-1])
    targets[:count] = torch.from_numpy(ids[1:])
    return inputs.view(rows, length), targets.view(rows, length)


def _next_state(state: State, zero_memories: bool) -> State:
    if not zero_memories:
        return state
    return tuple(
        {name: torch.zeros_like(value) if name == "recurrent_state" else value for name, value in layer.items()}
        for layer in state
    )
