"""Which memories the tokens of a text use. Needs torch only for a model, not for an exported artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .export.runner import Runner
    from .model import MoMForCausalLM

MemoryUse = NDArray[np.bool_]
"""``[layers, T, M]``: whether a token selected a routed memory."""


def memory_use_of_model(model: MoMForCausalLM, ids: Sequence[int]) -> MemoryUse:
    """From the router's logits; ties go to the lowest memory, as everywhere."""
    import torch

    from .ops import route

    with torch.no_grad():
        out = model(torch.tensor([list(ids)], device=model.lm_head.weight.device))
        indices = [route(logits[0], model.config.topk)[1].cpu().numpy() for logits in out.router_logits]
    use = np.zeros((len(indices), len(ids), model.config.num_memories), bool)
    for layer, chosen in enumerate(indices):
        np.put_along_axis(use[layer], chosen, True, 1)
    return use


def memory_use_of_runner(runner: Runner, ids: Sequence[int]) -> MemoryUse:
    """From the states, token by token: a memory that a token did not select stays as it was, bit for bit."""
    memories = runner.config.num_memories
    use = np.zeros((runner.config.num_hidden_layers, len(ids), memories), bool)
    state: Any = runner.init_state(1)
    for t, token in enumerate(ids):
        _, present = runner([[token]], state)
        for layer, (before, after) in enumerate(zip(state, present, strict=True)):
            use[layer, t] = _changed(before, after)[:memories]
        state = present
    return use


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> NDArray[np.bool_]:
    """``[M']``: whether any entry of a memory's state differs."""
    changed = []
    for name, value in after.items():
        new, old = np.asarray(value)[0], np.asarray(before[name])[0]
        changed.append((new != old).reshape(len(new), -1).any(1))
    return np.any(changed, 0)


def memory_use_table(use: MemoryUse, tokens: Sequence[str]) -> str:
    """Per token the memories of each layer, then the share of the choices that each memory got."""
    layers, _, memories = use.shape
    digits = len(str(memories - 1))
    cell = int(use.sum(2).max(initial=1)) * (digits + 1) - 1
    heads = [f"layer {layer}" for layer in range(layers)]
    widths = [max(len(head), cell) for head in heads]
    names = [repr(token) for token in tokens]
    first = max(map(len, [*names, "token"]))
    rows = [f"{'token':<{first}}  " + "  ".join(f"{head:<{w}}" for head, w in zip(heads, widths, strict=True))]
    for t, name in enumerate(names):
        chosen = [" ".join(f"{m:>{digits}}" for m in np.flatnonzero(use[layer, t])) for layer in range(layers)]
        rows.append(f"{name:<{first}}  " + "  ".join(f"{c:<{w}}" for c, w in zip(chosen, widths, strict=True)))
    rows.append("")
    for layer in range(layers):
        shares = use[layer].sum(0) / max(1, use[layer].sum())
        rows.append(f"layer {layer}: " + ", ".join(f"memory {m} {100 * share:.0f}%" for m, share in enumerate(shares)))
    return "\n".join(row.rstrip() for row in rows)
