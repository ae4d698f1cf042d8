"""Operations on states: to and from a file, more rows, other rows. A state is a value; all of these make a new one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._files import read_safetensors, write_safetensors
from .config import MoMConfig
from .state import STATE_LAYOUT_VERSION, LayerState, State, check_state

_SIZES = (
    "hidden_size num_hidden_layers num_heads num_v_heads head_dim expand_v num_memories topk shared_mem single_kv_proj "
    "update_rule use_short_conv conv_size vocab_size"
).split()
"""Fields of a config by which two models' states differ in shape or meaning."""


def save_state(state: Sequence[LayerState], path: str | os.PathLike[str], config: MoMConfig) -> None:
    """Write a state to a safetensors file, whole or not at all.

    Args:
        state: of a model with this config, on any device; dtypes are kept.
        path: of the file; its folder must exist.
        config: of the model; written along so that :func:`load_state` can refuse another.

    Raises:
        ValueError: a state that is not one of this config.
        OSError: the file could not be written.
    """
    batch = batch_size(state)
    check_state(config, state, batch, state[0]["recurrent_state"].device)
    target = Path(path)
    tensors = {f"{layer}.{name}": value for layer, values in enumerate(state) for name, value in values.items()}
    metadata = {"state_layout_version": str(STATE_LAYOUT_VERSION), "config": json.dumps(_sizes(config))}
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        write_safetensors(Path(name), tensors, metadata)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], config: MoMConfig, device: torch.device | str | None = None) -> State:
    """Read what :func:`save_state` wrote.

    Args:
        path: of the file.
        config: of the model that is to continue from it.
        device: where the state goes; the CPU by default.

    Returns:
        The state, in the dtypes it was saved in.

    Raises:
        ValueError: a missing or damaged file, one that holds no state, another layout version, another model.
    """
    from safetensors import safe_open

    file = Path(path)
    tensors = read_safetensors(file)
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata() or {}
    version = metadata.get("state_layout_version")
    if version is None:
        raise ValueError(f"{file} must hold a state, got other tensors; write it with save_state")
    if version != str(STATE_LAYOUT_VERSION):
        raise ValueError(
            f"{file} must have state_layout_version {STATE_LAYOUT_VERSION}, got {version}; "
            "read it with the version of mom_compile that wrote it"
        )
    saved, wanted = json.loads(metadata["config"]), _sizes(config)
    different = [name for name in _SIZES if saved.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"{file} must hold a state of a model with {name} = {wanted[name]!r}, got {saved.get(name)!r}; "
            "it belongs to another model"
        )
    layers: list[LayerState] = [{} for _ in range(config.num_hidden_layers)]
    for key, value in tensors.items():
        layer, _, name = key.partition(".")
        layers[int(layer)][name] = value.to(device or "cpu")
    state = tuple(layers)
    check_state(config, state, batch_size(state), state[0]["recurrent_state"].device)
    return state


def batch_size(state: Sequence[LayerState]) -> int:
    """The number of sequences of a state.

    Raises:
        ValueError: a state without layers, or a layer without ``recurrent_state``.
    """
    if not state or "recurrent_state" not in state[0]:
        raise ValueError(f"state must hold recurrent_state in every layer, got {len(state)} layers; pass out.state")
    return int(state[0]["recurrent_state"].shape[0])


def fork_state(state: Sequence[LayerState], rows: int) -> State:
    """A state of ``rows`` sequences that all continue from the one sequence of ``state``.

    Args:
        state: of one sequence.
        rows: at least 1.

    Returns:
        Copies, so that in-place decoding of one row leaves the others.

    Raises:
        ValueError: a state of several sequences (repeat rows of it with :func:`select_rows`), or ``rows`` below 1.
    """
    if batch_size(state) != 1:
        raise ValueError(
            f"state must be of one sequence to be forked, got {batch_size(state)}; use select_rows to repeat rows"
        )
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}; pass the number of continuations")
    return select_rows(state, [0] * rows)


def select_rows(state: Sequence[LayerState], rows: Sequence[int] | Tensor) -> State:
    """The sequences ``rows`` of a state, in this order; a row may repeat or be left out (beams, finished sequences).

    Args:
        state: of B sequences.
        rows: ``[N]`` indices in [0, B), as numbers or an int64 tensor.

    Returns:
        A state of N sequences, a copy, on the device of ``state``.

    Raises:
        ValueError: an index out of range, or not one axis. Indices in a CUDA tensor are not looked at, which would
            stall the device: there an index out of range is an error of the device.
    """
    batch = batch_size(state)
    device = state[0]["recurrent_state"].device
    # torch.tensor of an empty list is floating point.
    index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64, device="cpu")
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"rows must be [N] int64, got shape {tuple(index.shape)} of {index.dtype}; pass one index per new row"
        )
    if not index.is_cuda:
        outside = (index < 0) | (index >= batch)
        if bool(outside.any()):
            raise ValueError(f"rows must lie in [0, {batch}), got {int(index[outside][0])}; the state has {batch} rows")
    index = index.to(device)
    return tuple({name: value.index_select(0, index) for name, value in layer.items()} for layer in state)


def _sizes(config: MoMConfig) -> dict[str, object]:
    values = config.to_dict()
    sizes = {name: values[name] for name in _SIZES}
    sizes["num_v_heads"] = config.value_heads
    sizes["update_rule"] = [config.rule(layer) for layer in range(config.num_hidden_layers)]
    return sizes
