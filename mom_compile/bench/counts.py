"""Bytes and FLOP that a step needs at least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..ops import RULES


def selected(config: MoMConfig) -> int:
    """k', memories that a token reads and writes."""
    return config.topk + int(config.shared_mem)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def weight_bytes(model: MoMForCausalLM) -> int:
    """Bytes of the weights that a decode step reads: all but an embedding that is not the output projection."""
    unread = [] if model.config.tie_word_embeddings else [model.model.embeddings.weight]
    return tensor_bytes(model.parameters()) - tensor_bytes(unread)


def state_bytes(config: MoMConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the states that one token of each sequence reads and writes in one layer."""
    elements = batch * selected(config) * config.value_heads * config.head_dim * config.value_dim
    return 2 * elements * dtype.itemsize


def forward_flops(config: MoMConfig, tokens: int) -> float:
    """FLOP of one forward pass over ``tokens`` tokens; a training step is three times that.

    Matrix products of the weights that a token uses, and the memory rule in its sequential form, which is what every
    chunked form computes: 4 K V per head and memory, 6 K V with the delta rule's read.
    """
    hidden, keys = config.hidden_size, config.num_heads * config.head_dim
    values = config.value_heads * config.value_dim
    memories = selected(config)
    total = 2.0 * hidden * config.vocab_size
    for layer in range(config.num_hidden_layers):
        rule = RULES[config.rule(layer)]
        projections = keys + memories * (keys + values) + values + config.num_memories
        projections += memories * config.value_heads * (int(rule.delta) + int(rule.gate == "scalar"))
        if config.use_output_gate:
            projections += values
        total += 2 * hidden * (projections + 3 * config.mlp_size)
        if config.use_short_conv:
            total += 2 * memories * config.conv_channels * config.conv_size
        total += memories * config.value_heads * config.head_dim * config.value_dim * (6 if rule.delta else 4)
    return total * tokens
