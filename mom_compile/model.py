"""The MoM language model: embedding, blocks of MoM attention and SwiGLU, output projection, losses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import MoMBlock
from .config import MoMConfig
from .losses import IGNORE, balance_loss, next_token_loss, next_token_targets
from .memory_policy import block_policies
from .mom_attention import Form
from .ops import linear_cross_entropy
from .state import LayerState, State, check_state


class MoMOutput(NamedTuple):
    """Result of :class:`MoMForCausalLM`.

    Attributes:
        logits: ``[B, T, vocab_size]``, or None with labels.
        state: the state after the tokens; with labels it carries no gradient.
        loss: scalar, cross entropy + aux_loss_scale * aux_loss; None without labels.
        aux_loss: scalar, the balance loss; None without labels.
        router_logits: per layer ``[B, T, M]`` float32.
    """

    logits: Tensor | None
    state: State
    loss: Tensor | None
    aux_loss: Tensor | None
    router_logits: tuple[Tensor, ...]


class MoMModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MoMConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoMBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class MoMForCausalLM(nn.Module):
    """A causal language model of Mixture-of-Memories layers.

    Args:
        config: sizes and rules.

    Source: MoM (arXiv 2502.13685); parameter names follow flash-linear-attention's ``MomForCausalLM``.
    """

    def __init__(self, config: MoMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MoMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            nn.init.normal_(self.model.embeddings.weight, 0, config.initializer_range)
            nn.init.normal_(self.lm_head.weight, 0, config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty state for ``batch_size`` sequences.

        Args:
            batch_size: sequences, or documents with ``cu_seqlens``.
            device: where; None: that of the parameters.
            dtype: storage of the recurrent state, float32 by default; bfloat16 and float16 halve it.
        """
        device = None if device is None else torch.device(device)
        return tuple(layer.attn.init_state(batch_size, device, dtype) for layer in self.model.layers)  # type: ignore[operator,union-attr]

    def set_memory_policy(self, policy: str) -> None:
        """Choose what training keeps for the backward.

        Args:
            policy: ``save`` (everything: fastest), ``selective`` (what is dear: matrix products, the memory rule),
                ``block`` (the blocks' inputs: smallest) or ``auto`` (the default: selective where compiled, else save);
                with ``:N`` behind it for the first N blocks, the others then follow ``auto``: ``block:8``. See
                :mod:`mom_compile.memory_policy`.

        Raises:
            ValueError: another name.
        """
        layers = self.model.layers
        for block, each in zip(layers, block_policies(policy, len(layers)), strict=True):
            block.memory_policy = each  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor,
        state: Sequence[LayerState] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
        router_indices: Sequence[Tensor] | None = None,
        form: Form | None = None,
    ) -> MoMOutput:
        """Run tokens through the model.

        Args:
            input_ids: ``[B, T]`` int64 in [0, vocab_size).
            state: from :meth:`init_state` or an earlier output; None for an empty one. Never modified.
            attention_mask: ``[B, T]``, 0 for left or right padding.
            cu_seqlens: ``[N+1]`` boundaries of documents packed into ``[1, T]``; the state's batch is N.
            labels: ``[B, T]`` int64 targets, shifted by one inside; -100 is ignored, as is every target across a
                document boundary or on padding.
            return_logits: also return the logits when labels are given.
            router_indices: per layer ``[B, T, k]`` choices that replace the router's own.
            form: form of the layers, see :meth:`MoMAttention.forward`.

        Returns:
            :class:`MoMOutput`.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        self._check(input_ids, state, cu_seqlens, labels, router_indices)
        x, states, router_logits = self.hidden_states(
            input_ids, state, attention_mask, cu_seqlens, router_indices, form, detach_state=labels is not None
        )
        logits = loss = aux_loss = None
        if labels is None or return_logits:
            logits = self.lm_head(x)
        if labels is not None:
            if logits is None:
                targets = next_token_targets(labels, attention_mask, cu_seqlens)
                cross_entropy = linear_cross_entropy(x, self.lm_head.weight, targets, IGNORE)
            else:
                cross_entropy = next_token_loss(logits, labels, attention_mask, cu_seqlens)
            aux_loss = balance_loss(router_logits, self.config.topk, attention_mask)
            loss = cross_entropy + self.config.aux_loss_scale * aux_loss
        return MoMOutput(logits, states, loss, aux_loss, router_logits)

    def hidden_states(
        self,
        input_ids: Tensor,
        state: Sequence[LayerState] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        router_indices: Sequence[Tensor] | None = None,
        form: Form | None = None,
        detach_state: bool = False,
    ) -> tuple[Tensor, State, tuple[Tensor, ...]]:
        """:meth:`forward` up to the output projection.

        ``detach_state``: the returned state carries no gradient. A compiled block's backward would otherwise read zeros
        of its size as the gradient of a state that nobody uses.

        Returns:
            What ``lm_head`` takes ``[B, T, D]``, the state after the tokens, per layer the router's logits.
        """
        x = self.model.embeddings(input_ids)
        states: list[LayerState] = []
        router_logits: list[Tensor] = []
        for index, block in enumerate(self.model.layers):
            x, layer_state, logits = block(
                x,
                None if state is None else state[index],
                attention_mask,
                cu_seqlens,
                None if router_indices is None else router_indices[index],
                form,
                detach_state,
            )
            states.append(layer_state)
            if logits is not None:
                router_logits.append(logits)
        return self.model.norm(x), tuple(states), tuple(router_logits)

    def _check(
        self,
        input_ids: Tensor,
        state: Sequence[LayerState] | None,
        cu_seqlens: Tensor | None,
        labels: Tensor | None,
        router_indices: Sequence[Tensor] | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be [B, T] int64, got shape {tuple(input_ids.shape)} of {input_ids.dtype}; "
                "pass token ids, with a batch axis"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}; "
                "they are shifted inside"
            )
        if state is not None:
            sequences = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            check_state(self.config, state, sequences, input_ids.device)
        if router_indices is not None and len(router_indices) != self.config.num_hidden_layers:
            raise ValueError(
                f"router_indices must have one tensor for each of the {self.config.num_hidden_layers} layers, "
                f"got {len(router_indices)}; pass a list of [B, T, k]"
            )

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue ``input_ids``; see :func:`mom_compile.generate.generate`."""
        from .generate import generate

        return generate(self, input_ids, max_new_tokens, **options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors; see :func:`mom_compile.pretrained.save_pretrained`."""
        from .pretrained import save_pretrained

        save_pretrained(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> MoMForCausalLM:
        """Read a checkpoint folder, ours or fla's; see :func:`mom_compile.pretrained.from_pretrained`."""
        from .pretrained import from_pretrained

        return from_pretrained(directory, **options)
