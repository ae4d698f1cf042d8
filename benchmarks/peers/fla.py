"""flash-linear-attention's operator, layer and models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mom_compile import MoMConfig

NAME = "fla"
SLOW = True  # its layer and its models: dozens of kernels, each tuned at every new shape


def missing() -> str:
    absent = [name for name in ("fla", "transformers", "einops") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed"
    return "" if torch.cuda.is_available() else "it needs a GPU"


def unguarded() -> str:
    """Let the gated backward run on versions it refuses, for its time alone, and say so; '' where it runs anyway."""
    from fla.ops.common import chunk_o

    refuses = torch.cuda.get_device_capability()[0] == 9 and not chunk_o.TRITON_ABOVE_3_7_1
    if not refuses:
        return ""
    # Read by the check in chunk_bwd_dqkwg alone; the kernels and their tuning stay as they are.
    chunk_o.TRITON_ABOVE_3_7_1 = True
    return "its check for Hopper and Triton 3.4 to 3.7.0 (wrong gradients, its issue 640) bypassed for timing"


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    return theirs(q, k, v, g, beta)[0]


def layer(config: MoMConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from fla.layers.mom import MomAttention

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mom = MomAttention(
                hidden_size=config.hidden_size,
                head_dim=config.head_dim,
                num_heads=config.num_heads,
                expand_v=config.expand_v,
                conv_size=config.conv_size,
                norm_eps=config.norm_eps,
                num_memories=config.num_memories,
                topk=config.topk,
                shared_mem=config.shared_mem,
                layer_idx=0,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.mom(x)[0]

    return First().to(device, dtype).train()


def decoder(
    config: MoMConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[int, int], tuple[Callable[[], object], int]]:
    """Its MoM model after one token: its time does not depend on the context, and its prefill would tune first."""
    from fla.models import MomConfig, MomForCausalLM

    names = "vocab_size hidden_size num_hidden_layers num_heads head_dim expand_v num_memories topk shared_mem"
    names += " hidden_ratio tie_word_embeddings"
    theirs = MomConfig(**{name: getattr(config, name) for name in names.split()})
    model = MomForCausalLM(theirs).to(device, dtype).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def build(batch: int, context: int) -> tuple[Callable[[], object], int]:
        ids = torch.randint(0, config.vocab_size, (batch, 1), device=device)
        cache = model(ids, use_cache=True).past_key_values

        @torch.no_grad()
        def step() -> object:
            nonlocal cache
            out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            return out.logits.argmax(-1)

        memories = config.topk + int(config.shared_mem)
        states = 2 * 4 * batch * memories * config.num_heads * config.head_dim * config.value_dim
        return step, weights + config.num_hidden_layers * states

    return build
