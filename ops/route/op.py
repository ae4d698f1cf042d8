"""Registration of ``mom::route``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_dtype, check_range, check_rank, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from . import cpu

launch = LazyLaunch(__package__ or "")


def _check(logits: Tensor, topk: int) -> None:
    check_rank("logits", logits, "[T, M]")
    check_dtype("logits", logits, (torch.float32, torch.float64))
    check_range("topk", topk, 1, logits.shape[1], "select at least one and at most num_memories memories")


def _fake(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    _check(logits, topk)
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _cpu(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    _check(logits, topk)
    return cpu.route_fwd(logits, topk)


def _triton(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    _check(logits, topk)
    return launch.route_fwd(logits.contiguous(), topk)


def _bwd_check(dweights: Tensor, weights: Tensor, indices: Tensor, num_memories: int) -> None:
    check_rank("dweights", dweights, "[T, k]")
    check_shape("weights", weights, tuple(dweights.shape), "[T, k]")
    check_shape("indices", indices, tuple(dweights.shape), "[T, k]")


def _bwd_fake(dweights: Tensor, weights: Tensor, indices: Tensor, num_memories: int) -> Tensor:
    _bwd_check(dweights, weights, indices, num_memories)
    return weights.new_empty(weights.shape[0], num_memories)


def _bwd_triton(dweights: Tensor, weights: Tensor, indices: Tensor, num_memories: int) -> Tensor:
    return launch.route_bwd(dweights.contiguous(), weights.contiguous(), indices.contiguous(), num_memories)


route_bwd = register_op(
    "route_bwd",
    "(Tensor dweights, Tensor weights, Tensor indices, int num_memories) -> Tensor",
    fake=_bwd_fake,
    cpu=cpu.route_bwd,
    triton=_bwd_triton,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    ctx.num_memories = inputs[0].shape[1]


def _backward(ctx: Any, dweights: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    weights, indices = ctx.saved_tensors
    return route_bwd(dweights, weights, indices, ctx.num_memories), None


route = register_op(
    "route",
    "(Tensor logits, int topk) -> (Tensor weights, Tensor indices)",
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
)
