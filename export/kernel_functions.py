"""Which operators a kernel pack holds for a model, and inputs of any size to record or run them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import MoMConfig
from ..ops.decode_linear import launch as decode_linear
from ..ops.decode_step import launch as decode_step
from ..ops.gated_rms_norm import launch as gated_rms_norm
from ..ops.memory_rule import launch as memory_rule
from ..ops.memory_rule.rules import RULES
from ..ops.route import launch as route

Units = tuple[int, int]
CHUNK = 64


@dataclass(frozen=True)
class Function:
    """An operator at the sizes of one model, with one or two sizes left open.

    Attributes:
        name: a C identifier.
        operator: what it computes, the ``mom::`` name.
        units: names of the open sizes.
        limit: up to which first size the pack has kernels; configurations may depend on it, not on the second.
        run: (units, device) -> makes the operator's launches there, on random inputs.
    """

    name: str
    operator: str
    units: tuple[str, ...]
    limit: int
    run: Callable[[Units, torch.device], Any]


def functions(config: MoMConfig, dtype: torch.dtype) -> Iterator[Function]:
    """The operators of a decode step, and routing, gated norm and memory rule of prefill."""
    for rule in dict.fromkeys(config.rule(layer) for layer in range(config.num_hidden_layers)):
        run: Any = partial(_decode_step, config, dtype, rule)
        yield Function(f"decode_step_{rule}", "mom::decode_step_", ("batch",), 4096, run)
        for name, sizes in _products(config, rule).items():
            run = partial(_decode_linear, config, dtype, *sizes)
            yield Function(f"decode_{name}_{rule}", "mom::decode_linear", ("batch",), 4096, run)
        run = partial(_chunk_rule, config, dtype, rule)
        operator = f"mom::chunk_{RULES[rule].op}"
        yield Function(f"chunk_{rule}", operator, ("segments", "chunks"), 1 << 16, run)
    yield Function("route", "mom::route", ("tokens",), 1 << 20, partial(_route, config))
    if config.use_output_gate:
        run = partial(_gated_rms_norm, config, dtype)
        yield Function("gated_rms_norm", "mom::gated_rms_norm", ("rows",), 1 << 20, run)


class _Inputs:
    """Random tensors on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        return self(*shape, dtype=torch.float32)


def _groups(config: MoMConfig) -> int:
    return 1 if config.single_kv_proj else config.total_memories


def _small_outputs(config: MoMConfig, rule: str) -> int:
    gates = int(RULES[rule].delta) + int(RULES[rule].gate == "scalar")
    return config.num_memories + gates * _groups(config) * config.value_heads


def _decode_step(config: MoMConfig, dtype: torch.dtype, rule: str, units: Units, device: torch.device) -> Tensor:
    batch, new, groups = units[0], _Inputs(dtype, device), _groups(config)
    keys, values, kind = config.num_heads * config.head_dim, config.value_heads * config.value_dim, RULES[rule]
    scalar, conv, width = kind.gate == "scalar", config.use_short_conv, config.conv_size
    state = (batch, config.total_memories)
    return decode_step.decode_step(
        new(batch, 1, keys),
        new(batch, 1, groups, keys + values),
        new.wide(batch, 1, config.num_memories),
        None,
        None,
        new.wide(batch, 1, groups, config.value_heads) if scalar else None,
        new.wide(batch, 1, groups, config.value_heads) if kind.delta else None,
        new(config.value_heads) if scalar else None,
        new(config.value_heads) if scalar else None,
        new(config.conv_channels, width) if conv else None,
        new.wide(*state, config.value_heads, config.head_dim, config.value_dim),
        new(*state, config.conv_channels, width - 1) if conv else None,
        None,
        rule,
        config.topk,
        config.shared_mem,
        config.head_dim**-0.5,
        new(config.value_dim),
        new(batch, 1, config.value_heads, config.value_dim) if config.use_output_gate else None,
        config.norm_eps,
    )


def _products(config: MoMConfig, rule: str) -> dict[str, tuple[Any, ...]]:
    """Per linear layer of a decode step: norm (2: with its weight apart), SwiGLU, features, outputs,
    outputs in float32, added in place.

    The weights behind another norm are expected to have its weight multiplied into their columns.
    """
    keys, values, width = config.num_heads * config.head_dim, config.value_heads * config.value_dim, config.hidden_size
    gate = values if config.use_output_gate else 0
    return {
        "input": (1, 0, width, keys + _groups(config) * (keys + values) + gate, _small_outputs(config, rule), 0),
        "output": (0, 0, values, width, 0, 1),
        "mlp_in": (1, 1, width, config.mlp_size, 0, 0),
        "mlp_out": (0, 0, config.mlp_size, width, 0, 1),
        "head": (2, 0, width, config.vocab_size, 0, 0),
    }


def _decode_linear(
    config: MoMConfig,
    dtype: torch.dtype,
    norm: int,
    swiglu: int,
    features: int,
    outputs: int,
    small: int,
    added: int,
    units: Units,
    device: torch.device,
) -> Any:
    batch, new = units[0], _Inputs(dtype, device)
    return decode_linear.decode_linear(
        new(batch, features),
        new(outputs * (1 + swiglu), features),
        new(features) if norm == 2 else None,
        new.wide(small, features) if small else None,
        bool(norm),
        bool(swiglu),
        config.norm_eps,
        new(batch, outputs) if added else None,
    )


def _chunk_rule(config: MoMConfig, dtype: torch.dtype, rule: str, units: Units, device: torch.device) -> Any:
    (segments, chunks), new, kind = units, _Inputs(dtype, device), RULES[rule]
    rows, heads, value_heads = chunks * CHUNK, config.num_heads, config.value_heads
    # The first segments take a chunk each, the last one what is left; without a full chunk there a segment is empty.
    first = torch.arange(segments, dtype=torch.int32, device=device)
    start = first.clamp(max=chunks) * CHUNK
    end = torch.where(first == segments - 1, chunks, (first + 1).clamp(max=chunks)) * CHUNK
    length = (end - start - 5).clamp(min=0)  # a ragged end
    chunk = torch.arange(chunks, dtype=torch.int32, device=device)
    q, k = (torch.nn.functional.normalize(new(rows, heads, config.head_dim), dim=-1) for _ in range(2))
    return memory_rule.chunk_fwd(
        q,
        k,
        new(rows, value_heads, config.value_dim),
        None if kind.gate == "none" else -new.wide(rows, value_heads).abs(),
        new.wide(rows, value_heads).sigmoid() if kind.delta else None,
        new.wide(segments, value_heads, config.head_dim, config.value_dim),
        start.to(torch.int32),
        length.to(torch.int32),
        chunk.clamp(max=segments - 1),
        config.head_dim**-0.5,
        0,
    )


def _route(config: MoMConfig, units: Units, device: torch.device) -> Any:
    return route.route_fwd(_Inputs(torch.float32, device)(units[0], config.num_memories), config.topk)


def _gated_rms_norm(config: MoMConfig, dtype: torch.dtype, units: Units, device: torch.device) -> Tensor:
    new, size = _Inputs(dtype, device), config.value_dim
    return gated_rms_norm.gated_rms_norm_fwd(new(units[0], size), new(units[0], size), new(size), config.norm_eps)
