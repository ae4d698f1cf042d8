"""The functions of a kernel pack that make up a decode step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import MoMConfig
from ..ops.decode_linear import launch as decode_linear
from ..ops.decode_step import launch as decode_step
from ..ops.memory_rule.rules import RULES
from .kernel_function import Dtypes, Function, Inputs, groups
from .launch_formula import Units


def decode_functions(config: MoMConfig, dtypes: Dtypes) -> Iterator[Function]:
    """The linear layers and the step of every rule."""
    for rule in dict.fromkeys(config.rule(layer) for layer in range(config.num_hidden_layers)):
        run: Any = partial(_decode_step, config, dtypes, rule)
        yield Function(f"decode_step_{rule}", "mom::decode_step_", ("batch",), 4096, run)
        for name, sizes in _products(config, rule).items():
            run = partial(_decode_linear, config, dtypes, *sizes)
            # Larger batches are matrix products of a library.
            tiles = dtypes.model != torch.float32
            most = decode_linear.MOST_TILE_ROWS if tiles else decode_linear.MOST_ROWS
            yield Function(f"decode_{name}_{rule}", "mom::decode_linear", ("batch",), most, run)


SMALL_ALIGNMENT = 4
"""Each part of the float32 outputs begins at a multiple of so many of them: at 16 bytes, as every buffer does."""


def small_parts(config: MoMConfig, rule: str) -> dict[str, int]:
    """What a layer's product in float32 is made of, by the name that the decode step has for it, and its outputs."""
    gates, kind = groups(config) * config.value_heads, RULES[rule]
    parts = {"logits": config.num_memories}
    parts |= {"b": gates} if kind.delta else {}
    return parts | ({"a": gates} if kind.gate == "scalar" else {})


def _small_outputs(config: MoMConfig, rule: str) -> int:
    return sum(count + -count % SMALL_ALIGNMENT for count in small_parts(config, rule).values())


def _decode_step(config: MoMConfig, dtypes: Dtypes, rule: str, units: Units, device: torch.device) -> Tensor:
    batch, new, parts = units[0], Inputs(dtypes, device), groups(config)
    keys, values, kind = config.num_heads * config.head_dim, config.value_heads * config.value_dim, RULES[rule]
    scalar, conv, width = kind.gate == "scalar", config.use_short_conv, config.conv_size
    state = (batch, config.total_memories)
    return decode_step.decode_step(
        new(batch, 1, keys),
        new(batch, 1, parts, keys + values),
        new.wide(batch, 1, config.num_memories),
        None,
        None,
        new.wide(batch, 1, parts, config.value_heads) if scalar else None,
        new.wide(batch, 1, parts, config.value_heads) if kind.delta else None,
        new.kept(config.value_heads) if scalar else None,
        new.kept(config.value_heads) if scalar else None,
        new(config.conv_channels, width) if conv else None,
        new.wide(*state, config.value_heads, config.head_dim, config.value_dim),
        new.kept(*state, config.conv_channels, width - 1) if conv else None,
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
    """Per linear layer of a decode step: norm, SwiGLU, features, outputs, outputs in float32, added in place.

    The weights behind a norm are expected to have its weight multiplied into their columns.
    """
    keys, values, width = config.num_heads * config.head_dim, config.value_heads * config.value_dim, config.hidden_size
    gate = values if config.use_output_gate else 0
    return {
        "input": (
            True,
            False,
            width,
            keys + groups(config) * (keys + values) + gate,
            _small_outputs(config, rule),
            False,
        ),
        "output": (False, False, values, width, 0, True),
        "mlp_in": (True, True, width, config.mlp_size, 0, False),
        "mlp_out": (False, False, config.mlp_size, width, 0, True),
        "head": (False, False, width, config.vocab_size, 0, False),
    }


def _decode_linear(
    config: MoMConfig,
    dtypes: Dtypes,
    norm: bool,
    swiglu: bool,
    features: int,
    outputs: int,
    small: int,
    added: bool,
    units: Units,
    device: torch.device,
) -> Any:
    batch, new = units[0], Inputs(dtypes, device)
    return decode_linear.decode_linear(
        new(batch, features),
        new(outputs * (1 + swiglu), features),
        None,
        new.wide(small, features) if small else None,
        norm,
        swiglu,
        config.norm_eps,
        new(batch, outputs) if added else None,
    )
