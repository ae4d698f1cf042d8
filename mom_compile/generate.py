"""Text generation: prefill in pieces of bounded memory, then one token at a time on an explicit state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decode import DecodeSession, has_compiler, session_for, supports_session
from .sampling import check_sampling
from .state import check_state
from .validate import validate_inputs

if TYPE_CHECKING:
    from .model import MoMForCausalLM, MoMOutput
    from .state import LayerState

STOP_INTERVAL = 16
"""Tokens between two looks at whether every row has stopped, on a GPU."""
PREFILL_TOKENS = 8192
"""Tokens of one prefill call over all rows; longer prompts go through in pieces, which bounds the memory."""

COMPILE_TOKENS = 2000
"""Tokens from which on a CPU compiles its decode step: compiling takes about as long as a thousand eager steps."""


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw token ids on the device of the logits.

    Args:
        logits: ``[B, vocab_size]``.
        temperature: 0 takes the most probable token (ties: the lowest id), otherwise the logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        generator: source of randomness.

    Returns:
        ``[B]`` int64.

    Source: nucleus sampling (arXiv 1904.09751) section 3.1.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: MoMForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    state: Sequence[LayerState] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    decode: Callable[..., MoMOutput] | None = None,
    session: DecodeSession | None = None,
) -> Tensor:
    """Continue each row of ``input_ids``.

    Args:
        model: in eval mode or not; gradients are off.
        input_ids: ``[B, T]`` int64, T >= 1; rows of unequal length are padded left or right with ``attention_mask``.
        max_new_tokens: tokens to add; 0 returns the prompt.
        attention_mask: ``[B, T]``, 0 for padding, one run of ones per row.
        state: continue from an earlier state; never modified.
        temperature: 0 is greedy.
        top_p: nucleus, in (0, 1].
        seed: seed of the sampling; None draws a fresh one.
        eos_token_id: a row that drew it is filled with it; None: the config's (-1: never stop).
        on_token: called with each step's ``[B]`` ids, for streaming.
        decode: replaces ``model`` in the decode step, such as ``torch.compile(model)``.
        session: decodes in place of the model; it must be of this model and batch. Where ``decode`` is None and the
            model allows it, one is made by default and kept for the next call: on a GPU always, on a CPU, compiled, for
            ``COMPILE_TOKENS`` and more.

    Returns:
        ``[B, T + new]`` int64; shorter than T + max_new_tokens where every row has stopped.

    Raises:
        ValueError: an empty prompt, a token id out of range, a broken mask, an option out of range.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    validate_inputs(model.config, input_ids, attention_mask)
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids must hold at least one token, got an empty prompt; start with bos_token_id")
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
    batch, length = input_ids.shape
    generator = None
    if temperature > 0:
        generator = torch.Generator(input_ids.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
    if max_new_tokens == 0:
        return input_ids.clone()

    if state is not None:
        check_state(model.config, state, batch, input_ids.device)
    hidden: Tensor | None = None  # of each row's last token: the logits of the others are never computed
    last = _last_token(attention_mask, batch, length, input_ids.device)
    piece = max(PREFILL_TOKENS // max(batch, 1), 1)
    for start in range(0, length, piece):
        end = min(start + piece, length)
        mask = None if attention_mask is None else attention_mask[:, start:end]
        x, state, _ = model.hidden_states(input_ids[:, start:end], state, mask)
        rows = x[torch.arange(batch, device=last.device), (last - start).clamp(0, end - start - 1)]
        here = (last >= start) & (last < end)
        hidden = rows if hidden is None else torch.where(here.unsqueeze(1), rows, hidden)
    assert hidden is not None
    assert state is not None
    logits = model.lm_head(hidden)
    step = _decoder(model, state, decode, session, max_new_tokens)
    stop = -1 if eos_token_id is None else eos_token_id
    pieces = [input_ids]
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for index in range(max_new_tokens):
        token = sample(logits, temperature, top_p, generator)
        if stop >= 0:
            token = torch.where(done, stop, token)
            done = done | (token == stop)
        pieces.append(token.unsqueeze(1))
        if on_token is not None:
            on_token(token)
        # Reading `done` waits for the device: at every token only where someone listens to them.
        look = on_token is not None or not done.is_cuda or (index + 1) % STOP_INTERVAL == 0
        if index + 1 == max_new_tokens or (stop >= 0 and look and bool(done.all())):
            break
        logits = step(token)
    out = torch.cat(pieces, 1)
    if stop >= 0:
        finished = out[:, length:].eq(stop).cumsum(1).clamp(max=1).prod(0)
        out = out[:, : length + min(finished.shape[0], int((finished == 0).sum()) + 1)]
    return out


def _decoder(
    model: MoMForCausalLM,
    state: Sequence[LayerState],
    decode: Callable[..., MoMOutput] | None,
    session: DecodeSession | None,
    new_tokens: int,
) -> Callable[[Tensor], Tensor]:
    """``[B]`` ids -> ``[B, vocab_size]`` logits, from ``state`` on."""
    if session is not None:
        session.load(state)
        return session.step
    weight = model.lm_head.weight
    own = decode is None and supports_session(model) and not torch.is_autocast_enabled(weight.device.type)
    if own and weight.is_cuda and weight.dtype != torch.float64:
        return session_for(model, state).step
    if own and weight.device.type == "cpu" and new_tokens >= COMPILE_TOKENS and has_compiler():
        return session_for(model, state, compile=True).step
    run, current = decode or model, state

    def step(token: Tensor) -> Tensor:
        nonlocal current
        out = run(token.unsqueeze(1), state=current)
        assert out.logits is not None
        current = out.state
        return out.logits[:, -1]

    return step


def _last_token(attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Position of the last real token of each row."""
    if attention_mask is None:
        return torch.full((batch,), length - 1, device=device)
    position = torch.arange(length, device=device)
    return torch.where(attention_mask.to(torch.bool), position, -1).amax(1).clamp(min=0)
