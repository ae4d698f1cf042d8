"""Parameter names of flash-linear-attention's ``MomForCausalLM`` checkpoints, and their conversion to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import MoMConfig

_SAME = ("q_proj.weight", "g_proj.weight", "o_norm.weight", "o_proj.weight", "A_log", "dt_bias")


def is_fla_checkpoint(names: Mapping[str, object]) -> bool:
    """Whether the tensor names are those of fla's MoM."""
    return any(name.endswith((".attn.gate.weight", ".attn.q_conv1d.weight")) for name in names)


def convert_fla_checkpoint(tensors: Mapping[str, Tensor], config: MoMConfig) -> dict[str, Tensor]:
    """fla's tensors under our names: per-memory projections stacked, the three convolutions as one.

    Args:
        tensors: name -> tensor of a ``MomForCausalLM`` checkpoint.
        config: of the same checkpoint.

    Returns:
        The state dict of :class:`MoMForCausalLM`.

    Raises:
        ValueError: a tensor is missing.
    """
    out = {name: tensor for name, tensor in tensors.items() if ".attn." not in name}
    for layer in range(config.num_hidden_layers):
        source = f"model.layers.{layer}.attn."

        def take(name: str, source: str = source) -> Tensor:
            if source + name not in tensors:
                raise ValueError(
                    f"the checkpoint must hold {source + name}, got none; it is truncated, or its config.json belongs "
                    "to another model"
                )
            return tensors[source + name]

        def stack(name: str, take=take) -> Tensor:  # type: ignore[no-untyped-def]
            letter = name[0]
            if config.single_kv_proj:
                return take(f"shared_{letter}.weight").unsqueeze(0)
            memories = [take(f"{name}.{m}.weight") for m in range(config.num_memories)]
            return torch.stack([*memories, *([take(f"shared_{letter}.weight")] if config.shared_mem else [])])

        out[source + "router.weight"] = take("gate.weight")
        out[source + "kv_proj"] = torch.cat([stack("k_proj"), stack("v_proj")], 1)
        out[source + "b_proj"] = stack("b_proj")
        out[source + "a_proj"] = stack("a_proj")
        if config.use_short_conv:
            out[source + "conv1d"] = torch.cat([take(f"{x}_conv1d.weight").squeeze(1) for x in "qkv"])
        for name in _SAME:
            if name != "g_proj.weight" or config.use_output_gate:
                out[source + name] = take(name)
    return out
