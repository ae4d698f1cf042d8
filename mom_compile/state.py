"""The recurrent state of a model, layout version 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import MoMConfig
from .ops._checks import FLOATS, check_dtype

STATE_LAYOUT_VERSION = 1

LayerState = dict[str, Tensor]
State = tuple[LayerState, ...]
"""Per layer ``recurrent_state`` ``[B, M', HV, K, V]`` and, with a convolution, ``conv_state`` ``[B, M', C, W-1]``.

Memories: the routed ones 0..M-1, then the shared one. ``conv_state`` holds the last W-1 inputs of the convolution,
oldest first, channels q, k, v. B is the batch, or the number of documents with ``cu_seqlens``.
"""


def layer_shapes(config: MoMConfig, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's state by name."""
    memories = config.total_memories
    shapes: dict[str, tuple[int, ...]] = {}
    if config.use_short_conv:
        shapes["conv_state"] = (batch_size, memories, config.conv_channels, config.conv_size - 1)
    shapes["recurrent_state"] = (batch_size, memories, config.value_heads, config.head_dim, config.value_dim)
    return shapes


def init_layer_state(
    config: MoMConfig,
    batch_size: int,
    device: torch.device | None,
    dtype: torch.dtype | None,
    conv_dtype: torch.dtype,
) -> LayerState:
    """Zeros; ``dtype`` is that of the recurrent state, float32 by default (float64 for a float64 model)."""
    if batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size}; pass the number of sequences")
    if dtype is None:
        dtype = torch.float64 if conv_dtype == torch.float64 else torch.float32
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}; float32 is the default")
    return {
        name: torch.zeros(shape, device=device, dtype=dtype if name == "recurrent_state" else conv_dtype)
        for name, shape in layer_shapes(config, batch_size).items()
    }


def check_layer_state(
    config: MoMConfig, state: Mapping[str, Tensor], batch_size: int, device: torch.device, where: str
) -> None:
    """Raise unless ``state`` fits the model, the batch and the device."""
    shapes = layer_shapes(config, batch_size)
    if set(state) != set(shapes):
        raise ValueError(
            f"{where} must hold {', '.join(sorted(shapes))}, got {', '.join(sorted(state)) or 'nothing'}; "
            "pass a state of this model, as init_state or a forward returns it"
        )
    for name, shape in shapes.items():
        value = state[name]
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{where}[{name!r}] must have shape {shape}, got {tuple(value.shape)}; "
                "pass a state of this model and batch size, as init_state or a forward returns it"
            )
        check_dtype(f"{where}[{name!r}]", value, FLOATS)
        if value.device != device:
            raise ValueError(
                f"{where}[{name!r}] must lie on {device}, got {value.device}; move it with .to({str(device)!r})"
            )


def check_state(
    config: MoMConfig, state: Sequence[Mapping[str, Tensor]], batch_size: int, device: torch.device
) -> None:
    """:func:`check_layer_state` for every layer of a model."""
    if len(state) != config.num_hidden_layers:
        raise ValueError(
            f"state must have one entry for each of the {config.num_hidden_layers} layers, got {len(state)}; "
            "pass a state of this model"
        )
    for layer, layer_state in enumerate(state):
        check_layer_state(config, layer_state, batch_size, device, f"state[{layer}]")
