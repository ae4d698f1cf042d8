"""One block: MoM attention and a SwiGLU MLP, each behind an RMSNorm and a residual."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from .config import MoMConfig
from .memory_policy import MemoryPolicy, run_with_policy
from .mom_attention import Form, MoMAttention
from .state import LayerState, layer_shapes


class SwiGLU(nn.Module):
    """``down(SiLU(gate(x)) * up(x))``. Source: GLU variants (arXiv 2002.05202)."""

    def __init__(self, config: MoMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(projection.weight, 0, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, T, D]`` -> ``[B, T, D]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoMBlock(nn.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
        memory_policy: what training keeps for the backward, see :mod:`mom_compile.memory_policy`.
    """

    def __init__(self, config: MoMConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = MoMAttention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.memory_policy: MemoryPolicy = "auto"

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        router_indices: Tensor | None = None,
        form: Form | None = None,
        detach_state: bool = False,
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """As :meth:`MoMAttention.forward`; with ``detach_state`` the returned state carries no gradient."""
        names = tuple(layer_shapes(self.attn.config, 1))

        def plain(x: Tensor) -> tuple[Tensor, LayerState, Tensor | None]:
            y, new_state, logits = self.attn(self.attn_norm(x), state, attention_mask, cu_seqlens, router_indices, form)
            if detach_state:
                new_state = {name: value.detach() for name, value in new_state.items()}
            x = x + y
            return x + self.mlp(self.mlp_norm(x)), new_state, logits

        def flat(x: Tensor) -> tuple[Tensor, ...]:
            x, new_state, logits = plain(x)
            tensors = (x, *(new_state[name] for name in names))
            return tensors if logits is None else (*tensors, logits)

        if not self.training or form not in (None, "packed"):
            return plain(x)
        random = self.attn.custom_router is not None
        x, *rest = run_with_policy(self.memory_policy, flat, x, random=random)
        return x, dict(zip(names, rest, strict=False)), rest[-1] if len(rest) > len(names) else None
