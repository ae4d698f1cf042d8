"""Checks of values, for data that enters on the CPU: they read the tensors, so a GPU would stall."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MoMConfig


def validate_inputs(
    config: MoMConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Raise unless the values fit the model.

    Args:
        config: of the model.
        input_ids: ``[B, T]`` token ids in [0, vocab_size).
        attention_mask: ``[B, T]`` of zeros and ones, one run of ones in every row.
        cu_seqlens: ``[N+1]`` rising from 0 to T.
        labels: ``[B, T]`` token ids, or -100.

    Raises:
        ValueError: names the argument, the value and its place.
    """
    _check_ids("input_ids", input_ids, config.vocab_size, None)
    if labels is not None:
        _check_ids("labels", labels, config.vocab_size, -100)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}; pass one value per token"
            )
        mask = attention_mask.to(torch.int64)
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("attention_mask must hold zeros and ones, got other values; 1 marks a real token")
        edges = torch.nn.functional.pad(mask, (1, 1)).diff(dim=1)
        runs = (edges == 1).sum(1)
        bad = (runs != 1).nonzero()
        if mask.shape[1] and len(bad):
            row = int(bad[0])
            raise ValueError(
                f"attention_mask must have one run of ones in every row, got {int(runs[row])} in row {row}; "
                "pad on the left or on the right"
            )
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != input_ids.shape[1] or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {input_ids.shape[1]} tokens, got {bounds[:8]}; "
                "pass cumulative document lengths"
            )


def _check_ids(name: str, ids: Tensor, vocab_size: int, ignore: int | None) -> None:
    bad = (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        bad &= ids != ignore
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must lie in [0, vocab_size = {vocab_size}), got {int(ids[where])} at position {where}; "
            "the text was tokenized for another model"
        )
