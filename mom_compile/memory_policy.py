"""What a block keeps for its backward: everything, the results that are dear, or its input alone.

- ``save``: whatever its operators ask for. Nothing is computed again.
- ``selective``: its input, its routing, and the results of matrix products, of the memory rule and of the norm behind
  it, and the gates of the rows. What else takes one pass over memory is computed again in the backward: norms, row
  copies, convolution, activations.
- ``block``: its input. The whole block is computed again.
- ``auto`` (default): ``selective`` in a compiled block, ``save`` in an eager one, where each operator would pass
  through Python twice more and wait for it.

``block:8`` gives the first 8 blocks that policy and ``auto`` to the others, for what ``auto`` alone does not quite fit.

All give the same gradients, bit for bit where the operators repeat bit for bit, under torch.compile of the model or of
single blocks as well as eagerly. They act in training alone: ``model.train()`` with grad mode enabled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .ops import RULES

MemoryPolicy = Literal["auto", "save", "selective", "block"]
MEMORY_POLICIES: tuple[MemoryPolicy, ...] = get_args(MemoryPolicy)

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.mom.grouped_linear.default,
    torch.ops.mom.small_linear.default,
    torch.ops.mom.route.default,
    torch.ops.mom.dispatch.default,
    torch.ops.mom.gate_rows.default,  # small
    torch.ops.mom.combine_norm.default,  # the output projection's input: four passes over the rows for one kept
    *(getattr(torch.ops.mom, f"chunk_{rule.op}").default for rule in RULES.values()),
}


def block_policies(text: str, blocks: int) -> list[MemoryPolicy]:
    """The policy of each block.

    Args:
        text: one of :data:`MEMORY_POLICIES`, for all blocks, or with ``:N`` behind it for the first N; the others
            follow ``auto``.
        blocks: L of the model; N may be larger.

    Raises:
        ValueError: another name, or an N that is no whole number of at least 0.
    """
    name, colon, digits = text.partition(":")
    for known in MEMORY_POLICIES:
        if name == known and (not colon or digits.isdecimal()):
            first = min(int(digits), blocks) if colon else blocks
            return [known] * first + ["auto"] * (blocks - first)
    raise ValueError(
        f"memory policy must be one of {', '.join(MEMORY_POLICIES)}, or one with :N for the first N blocks, "
        f"got {text!r}; save is fastest, block smallest"
    )


def _keep_dear_results(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _keep_dear_results)


def run_with_policy(
    policy: MemoryPolicy, function: Callable[..., tuple[Tensor, ...]], *args: Any, random: bool = False
) -> tuple[Tensor, ...]:
    """``function(*args)``, whose saved tensors follow ``policy``.

    Args:
        policy: one of :data:`MEMORY_POLICIES`.
        function: returns tensors alone.
        args: of the function.
        random: whether it draws random numbers, which the second computation then repeats.

    Source: selective activation recomputation (arXiv 2205.05198) section 5, by torch.utils.checkpoint.
    """
    if policy == "auto":
        policy = "selective" if torch.compiler.is_compiling() else "save"
    # Dynamo of torch 2.11 answers is_exporting with yes in every torch.compile.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if policy == "save" or not torch.is_grad_enabled() or exporting:
        return function(*args)
    options: dict[str, Any] = {"context_fn": _selective} if policy == "selective" else {}
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **options)  # type: ignore[no-any-return]
