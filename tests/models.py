"""Small models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mom_compile import MoMConfig, MoMForCausalLM

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-shared": {"shared_mem": False},
    "single-kv-no-conv": {"single_kv_proj": True, "use_short_conv": False},
    "gva-all-memories": {"num_v_heads": 4, "expand_v": 0.5, "topk": 4, "use_output_gate": False},
    "one-memory": {"num_memories": 1, "topk": 1},
}


def tiny_config(rule: str | list[str] = "gated_delta", **changes: Any) -> MoMConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "num_memories": 4,
        "topk": 2,
        "intermediate_size": 48,
        "initializer_range": 0.2,
    }
    return MoMConfig(**{**sizes, "update_rule": rule, **changes})


def tiny_model(rule: str | list[str] = "gated_delta", **changes: Any) -> MoMForCausalLM:
    torch.manual_seed(0)
    return MoMForCausalLM(tiny_config(rule, **changes)).eval()


def two_layers(rule: str) -> MoMForCausalLM:
    """A byte-level model of gated_delta, then of another rule with a router for which all memories are equal."""
    sizes = {"num_hidden_layers": 2, "num_v_heads": 4, "vocab_size": 257, "eos_token_id": 256}
    model = tiny_model(["gated_delta", rule], **sizes)
    with torch.no_grad():
        model.model.layers[1].attn.router.weight.zero_()  # type: ignore[operator,union-attr]
    return model


def tokens(batch: int, length: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length))
