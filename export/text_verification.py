"""A held-out text through a model and its artifacts, bits per byte compared; and their speeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data import TokenStream
from ..evaluate import bits_per_byte, evaluate, rows
from ..report import Check
from .precision import BITS_PER_BYTE
from .runner import Runner
from .stored_state import state_dtype_of
from .verification import precision_of, random_tokens

if TYPE_CHECKING:
    from ..model import MoMForCausalLM

MAX_TOKENS = 32768
BATCH_SIZE = 16
PIECE = 256
SPEED_STEPS, SPEED_PREFILL = 64, 512


@dataclass(frozen=True)
class HeldOut:
    """A text that the model was not trained on, its first 32,768 tokens, and what the model makes of it."""

    model: MoMForCausalLM
    stream: TokenStream

    @cached_property
    def reference(self) -> float:
        """The model's bits per byte."""
        return evaluate(
            self.model, self.stream, batch_size=BATCH_SIZE, seq_len=PIECE, max_tokens=MAX_TOKENS
        ).bits_per_byte

    def draw(self, batch: int, length: int, seed: int) -> NDArray[np.int64]:
        """``[B, T]`` windows of the text; it repeats where it is shorter than a window."""
        ids = self.stream.ids.astype(np.int64)
        starts = np.random.default_rng(seed).integers(0, max(1, len(ids) - length + 1), (batch, 1))
        return ids[(starts + np.arange(length)) % len(ids)]


def bits_per_byte_check(runner: Runner, text: HeldOut) -> Check:
    """Bits per byte of the artifact against the model's, over the same rows; lower is never wrong."""
    actual = runner_bits_per_byte(runner, text.stream)
    worse = actual / text.reference - 1
    limit = max(BITS_PER_BYTE[precision_of(runner)], BITS_PER_BYTE[state_dtype_of(runner.manifest)])
    note = f"{actual:.4f} against {text.reference:.4f}, at most {limit:+.1%}"
    return Check("bits per byte", None, worse <= limit, note, f"{worse:+.3%}")


def runner_bits_per_byte(runner: Runner, stream: TokenStream) -> float:
    """As :func:`mom_compile.evaluate.evaluate`, with an artifact."""
    ids = stream.ids[: MAX_TOKENS + 1]
    inputs, targets = (part.numpy() for part in rows(ids.astype(np.int64), BATCH_SIZE))
    nats, state = 0.0, None
    for start in range(0, inputs.shape[1], PIECE):
        logits, state = runner(inputs[:, start : start + PIECE], state)
        y = targets[:, start : start + PIECE]
        values = np.asarray(logits, np.float64)
        highest = values.max(-1, keepdims=True)
        total = np.log(np.exp(values - highest).sum(-1)) + highest[..., 0]
        chosen = np.take_along_axis(values, np.maximum(y, 0)[..., None], -1)[..., 0]
        nats += float(((total - chosen) * (y >= 0)).sum())
    return bits_per_byte(nats, int(stream.token_bytes[1 : len(ids)].sum(dtype=np.int64)))


def speed_checks(runner: Runner, model: MoMForCausalLM) -> list[Check]:
    """Medians of one run as ratios to the eager model: nothing is required of them."""
    import torch

    ids = random_tokens(model.config.vocab_size, 1, SPEED_PREFILL, seed=600)
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        state: Any = model(tokens[:, :8]).state
        prefill = _median(lambda: model(tokens), 3) / _median(lambda: runner(ids), 3)
        step = runner.decode_loop(state, 1)
        decode = _median(lambda: model(tokens[:, :1], state=state), SPEED_STEPS) / _median(
            lambda: step(ids[:, 0]), SPEED_STEPS
        )
    note = "eager time over the artifact's"
    return [
        Check(f"speed, prefill of {SPEED_PREFILL}", None, True, note, f"{prefill:.2f}x"),
        Check("speed, decode", None, True, note, f"{decode:.2f}x"),
    ]


def _median(call: Callable[[], Any], count: int) -> float:
    call()
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
