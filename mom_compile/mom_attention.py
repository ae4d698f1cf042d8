"""The Mixture-of-Memories layer: parameters, checks and the choice among its three forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import packed, portable, step
from .config import MoMConfig
from .ops import gated_rms_norm
from .ops.memory_rule import RULES
from .state import LayerState, check_layer_state, init_layer_state

Form = Literal["packed", "portable", "step", "touched", "dense"]
FORMS = ("packed", "portable", "step", "touched", "dense")
ONE_TOKEN_FORMS = ("touched", "dense")
MAX_STEP_TOKENS = 8

Router = Callable[[Tensor], tuple[Tensor, Tensor]]


class MoMAttention(nn.Module):
    """One Mixture-of-Memories layer, usable in any ``nn.Module``.

    A router sends each token to k of M memories, each a matrix-valued recurrent state with its own key and value
    projections and its own short convolution; a shared memory takes every token. The token reads its k + 1 memories and
    sums them by the router's weights.

    Args:
        config: sizes, see :class:`MoMConfig`.
        layer_idx: index of the layer; chooses the update rule where the config names one per layer.
        router: optional replacement of the linear router: a callable x ``[B, T, D]`` -> (weights ``[B, T, k]`` float32,
            indices ``[B, T, k]`` int64 in [0, M), different for one token), of static shape.

    Source: MoM (arXiv 2502.13685) section 3.2.
    """

    def __init__(self, config: MoMConfig, layer_idx: int = 0, router: Router | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.rule = RULES[config.rule(layer_idx)]
        self.custom_router = router
        hidden, heads, value_heads = config.hidden_size, config.num_heads, config.value_heads
        self.key_size = heads * config.head_dim
        self.value_size = value_heads * config.value_dim
        groups = 1 if config.single_kv_proj else config.total_memories
        if router is None:
            self.router = nn.Linear(hidden, config.num_memories, bias=False)
        self.q_proj = nn.Linear(hidden, self.key_size, bias=False)
        self.kv_proj = nn.Parameter(torch.empty(groups, self.key_size + self.value_size, hidden))
        if self.rule.delta:
            self.b_proj = nn.Parameter(torch.empty(groups, value_heads, hidden))
        if self.rule.gate == "scalar":
            self.a_proj = nn.Parameter(torch.empty(groups, value_heads, hidden))
            self.A_log = nn.Parameter(torch.empty(value_heads))
            self.dt_bias = nn.Parameter(torch.empty(value_heads))
        if config.use_short_conv:
            self.conv1d = nn.Parameter(torch.empty(config.conv_channels, config.conv_size))
        if config.use_output_gate:
            self.g_proj = nn.Linear(hidden, self.value_size, bias=False)
        self.o_norm = nn.RMSNorm(config.value_dim, eps=config.norm_eps)
        self.o_proj = nn.Linear(self.value_size, hidden, bias=False)
        self.scale = config.head_dim**-0.5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights; A_log = log U(1, 16); dt_bias the inverse softplus of log-uniform [1e-3, 0.1]."""
        std = self.config.initializer_range
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("_norm.weight"):
                    parameter.fill_(1)
                elif name == "A_log":
                    parameter.uniform_(1, 16).log_()
                elif name == "dt_bias":
                    dt = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)).exp_()
                    parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
                elif name == "conv1d":
                    bound = self.config.conv_size**-0.5
                    parameter.uniform_(-bound, bound)
                else:
                    parameter.normal_(0, std)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LayerState:
        """Zeros for ``batch_size`` sequences; ``dtype`` (float32) is that of the recurrent state."""
        weight = self.q_proj.weight
        return init_layer_state(self.config, batch_size, device or weight.device, dtype, weight.dtype)

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        router_indices: Tensor | None = None,
        form: Form | None = None,
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Run the layer.

        Args:
            x: ``[B, T, D]`` floating point.
            state: what an earlier call returned, or None for an empty one. Never modified.
            attention_mask: ``[B, T]`` bool or integers, 0 for padding; one run of ones per row. Padding changes no
                state and its output is zero.
            cu_seqlens: ``[N+1]`` int boundaries of documents packed into B = 1; the state's batch is then N.
            router_indices: ``[B, T, k]`` int64 choices to use in place of the router's own; the weights still follow
                its logits.
            form: ``packed`` (training, prefill), ``portable`` (export), ``step`` (at most 8 tokens); for the export of
                one token ``touched`` (the new state is only what it wrote) or ``dense`` (all memories, masked); None
                chooses step for one token with a state, else packed.

        Returns:
            y ``[B, T, D]``, the new state, and the router logits ``[B, T, M]`` float32 (None with a custom router).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        self._check(x, state, attention_mask, cu_seqlens, router_indices, form)
        if form is None:
            form = "step" if x.shape[1] == 1 and state is not None and cu_seqlens is None else "packed"
        valid = None if attention_mask is None else attention_mask.to(torch.bool)
        runs = {
            "packed": packed.forward,
            "portable": portable.forward,
            "step": step.forward,
            "touched": step.touched,
            "dense": step.dense,
        }
        run = runs[form]
        o, new_state, logits = run(self, x, state, valid, cu_seqlens, router_indices)
        if form != "packed":
            o = self.output_norm(x, o)
        return self.o_proj(o.flatten(2)), new_state, logits

    def output_norm(self, x: Tensor, o: Tensor) -> Tensor:
        """``RMSNorm(o) * SiLU(x Wg)``; o ``[B, T, HV, V]``."""
        o = o.to(x.dtype)
        if self.config.use_output_gate:
            gate = self.g_proj(x).view(o.shape)
            return gated_rms_norm(o.to(gate.dtype), gate, self.o_norm.weight, self.config.norm_eps)
        return F.rms_norm(o, (o.shape[-1],), self.o_norm.weight.to(o.dtype), self.config.norm_eps)

    def _check(
        self,
        x: Tensor,
        state: Mapping[str, Tensor] | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        router_indices: Tensor | None,
        form: str | None,
    ) -> None:
        config = self.config
        if x.dim() != 3 or x.shape[2] != config.hidden_size:
            raise ValueError(
                f"x must be [B, T, hidden_size = {config.hidden_size}], got shape {tuple(x.shape)}; "
                "pass hidden states of this width"
            )
        batch, length, _ = x.shape
        if form is not None and form not in FORMS:
            raise ValueError(
                f"form must be one of {', '.join(FORMS)} or None, got {form!r}; None chooses by the length"
            )
        if form == "step" and length > MAX_STEP_TOKENS:
            raise ValueError(f"x must have at most {MAX_STEP_TOKENS} tokens for form step, got {length}; use packed")
        if form in ONE_TOKEN_FORMS and (length != 1 or state is None or attention_mask is not None):
            raise ValueError(
                f"x must have one token, a state and no mask for form {form}, got {length} tokens, "
                f"{'no' if state is None else 'a'} state; use step"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask must be [B, T] = {(batch, length)}, got shape {tuple(attention_mask.shape)}; "
                "it covers the tokens of this call, not those before"
            )
        sequences = batch
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"x must have batch size 1 with cu_seqlens, got {batch}; flatten the documents")
            if cu_seqlens.dim() != 1:
                raise ValueError(
                    f"cu_seqlens must be [N+1], got shape {tuple(cu_seqlens.shape)}; pass cumulative lengths from 0"
                )
            if form not in (None, "packed"):
                raise ValueError(f"cu_seqlens must be None for form {form}, got a tensor; use packed")
            sequences = cu_seqlens.shape[0] - 1
        if router_indices is not None and tuple(router_indices.shape) != (batch, length, config.topk):
            raise ValueError(
                f"router_indices must be [B, T, k] = {(batch, length, config.topk)}, "
                f"got shape {tuple(router_indices.shape)}; pass one choice per token and rank"
            )
        if state is not None:
            check_layer_state(config, state, sequences, x.device, "state")
