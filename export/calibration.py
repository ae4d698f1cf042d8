"""The weights of 4 bits in int4, rounded on texts of the model's own: no data is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..model import MoMForCausalLM
from .gptq import gptq
from .precision import BLOCK_SIZE

SAMPLES, SAMPLE_TOKENS = 32, 256


class Rounded(NamedTuple):
    """A weight ``[K, N]`` as levels ``[K, N]``, scales and zero points ``[K / 16, N]``; see :func:`gptq`."""

    levels: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zero_points: NDArray[np.uint8]


def weight_key(weight: NDArray[Any]) -> bytes:
    """What a weight ``[K, N]`` is known by in every graph."""
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest()


@torch.no_grad()
def round_weights(model: MoMForCausalLM) -> Mapping[bytes, Rounded]:
    """The projections to all memories' k and v in 4 bits, by :func:`weight_key`.

    They are the largest matrices, and what they write into a memory is read over many tokens. The errors of any other
    matrix in 4 bits reach the residual stream, from which later layers choose their memories, less evened out.
    """
    moments: list[Any] = [0.0] * len(model.model.layers)
    hooks = []
    for index, block in enumerate(model.model.layers):

        def add(_: Any, arguments: tuple[torch.Tensor, ...], index: int = index) -> None:
            x = arguments[0].flatten(0, -2).double()
            moments[index] = moments[index] + x.T @ x

        hooks.append(block.attn.q_proj.register_forward_pre_hook(add))  # type: ignore[union-attr,operator]
    try:
        ids = _sample(model)
        moments[:] = [0.0] * len(moments)  # those of drawing
        for row in ids.split(4):
            model(row)
    finally:
        for hook in hooks:
            hook.remove()
    rounded = {}
    for block, moment in zip(model.model.layers, moments, strict=True):
        weight = block.attn.kv_proj.flatten(0, 1).T.contiguous().numpy()  # type: ignore[union-attr,operator]
        rounded[weight_key(weight)] = Rounded(*gptq(weight, moment.numpy(), BLOCK_SIZE))
    return rounded


def _sample(model: MoMForCausalLM) -> torch.Tensor:
    """``[32, 256]``, drawn token by token."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, model.config.vocab_size, (SAMPLES, 1), generator=generator)
    return model.generate(first, SAMPLE_TOKENS - 1, temperature=1.0, seed=0, eos_token_id=-1)
