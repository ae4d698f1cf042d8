"""torch.library.opcheck on every operator of the namespace, and the recorded schemas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_indices, rule_inputs
from torch import Tensor

import mom_compile.ops as ops
from mom_compile.ops import RULES, dispatch
from mom_compile.ops.memory_rule.rules import SAVE_ALL

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mom::"))
Sample = Callable[[], tuple[Any, ...]]


def _plan() -> ops.DispatchPlan:
    return dispatch(random_indices(70, 3, 2), torch.tensor([0, 5, 70]), 3, None, True)


def _rows(plan: ops.DispatchPlan, *shape: int) -> Tensor:
    real = (plan.entry_of >= 0).view(-1, *([1] * len(shape)))
    return (torch.randn(plan.entry_of.shape[0], *shape) * real).requires_grad_()


def _chunk(rule: str) -> Sample:
    def sample() -> tuple[Any, ...]:
        plan = _plan()
        inputs = [x for x in rule_inputs(rule, (plan.entry_of.shape[0],), 1, 2, 4, 3) if x is not None]
        real = plan.entry_of >= 0
        placed = [x if x.dim() == 1 else x * real.view(-1, *([1] * (x.dim() - 1))) for x in inputs]
        state = torch.randn(8, 2, 4, 3, requires_grad=True)
        return (*[x.requires_grad_() for x in placed], state, *plan.segments, 0.5, SAVE_ALL)

    return sample


def _recurrent(rule: str, grad: bool) -> Sample:
    def sample() -> tuple[Any, ...]:
        inputs = [x.requires_grad_(grad) for x in rule_inputs(rule, (2, 3), 1, 2, 4, 3) if x is not None]
        return (*inputs, torch.randn(4, 2, 4, 3, requires_grad=grad), torch.tensor([3, 0]), None, 0.5)

    return sample


def _chunk_bwd() -> tuple[Any, ...]:
    q, k, v, g, beta, state, start, length, chunk, scale, save = _chunk("gated_delta")()
    with torch.no_grad():
        o, final_state, *saved = torch.ops.mom.chunk_gated_delta_rule(
            q, k, v, g, beta, state, start, length, chunk, scale, save
        )
        do = torch.randn_like(o) * (q.abs().sum((1, 2)) > 0).view(-1, 1, 1)
    leaves = [x.detach() for x in (q, k, v, g, beta, state)]
    return (*leaves, start, length, chunk, *saved, do, torch.randn_like(final_state), scale)


def _decode_step() -> tuple[Any, ...]:
    return (
        torch.randn(2, 3, 4), torch.randn(2, 3, 4, 10), torch.randn(2, 3, 3), None, None, torch.randn(2, 3, 4, 2),
        torch.randn(2, 3, 4, 2), torch.rand(2), torch.randn(2), torch.randn(14, 4), torch.randn(2, 4, 2, 4, 3),
        torch.randn(2, 4, 14, 3), torch.rand(2, 3) > 0.5, "gated_delta", 2, True, 0.5,
        torch.rand(3), torch.randn(2, 3, 6), 1e-6,
    )  # fmt: skip


def samples() -> dict[str, Sample]:
    plan = _plan()
    samples: dict[str, Sample] = {
        "route": lambda: (torch.randn(9, 4, requires_grad=True), 2),
        "route_bwd": lambda: (torch.randn(9, 2), torch.rand(9, 2), random_indices(9, 4, 2), 4),
        "dispatch": lambda: (random_indices(70, 3, 2), torch.tensor([0, 5, 70]), None, 3, True, 64),
        "permute": lambda: (torch.randn(70, 5, requires_grad=True), plan.slot_of, plan.entry_of),
        "permute_bwd": lambda: (_rows(plan, 5).detach(), plan.slot_of),
        "combine": lambda: (_rows(plan, 2, 3), torch.rand(70, 2, requires_grad=True), plan.slot_of, plan.entry_of),
        "combine_bwd": lambda: (
            torch.randn(70, 2, 3), _rows(plan, 2, 3).detach(), torch.rand(70, 2), plan.slot_of, plan.entry_of,
        ),
        "combine_norm": lambda: (
            _rows(plan, 2, 3), torch.rand(70, 2, requires_grad=True), plan.slot_of, plan.entry_of,
            torch.randn(70, 2, 3, requires_grad=True), torch.rand(3, requires_grad=True), 1e-6,
        ),
        "combine_norm_bwd": lambda: (
            torch.randn(70, 2, 3), _rows(plan, 2, 3).detach(), torch.rand(70, 2), plan.slot_of, plan.entry_of,
            torch.randn(70, 2, 3), torch.rand(3), 1e-6,
        ),
        "short_conv": lambda: (
            _rows(plan, 6), torch.randn(6, 4, requires_grad=True), torch.randn(8, 6, 3, requires_grad=True),
            *plan.segments, "silu",
        ),
        "short_conv_bwd": lambda: (
            _rows(plan, 6).detach(), torch.randn(8, 6, 3), _rows(plan, 6).detach(), torch.randn(6, 4),
            torch.randn(8, 6, 3), *plan.segments, "silu",
        ),
        "conv_qkv": lambda: (
            torch.randn(70, 4, requires_grad=True), _rows(plan, 7), torch.randn(11, 4, requires_grad=True),
            torch.randn(8, 11, 3, requires_grad=True), plan.slot_of, plan.entry_of, *plan.segments, 2,
        ),
        "conv_qkv_bwd": lambda: (
            *(_rows(plan, 2, 2).detach() for _ in range(2)), _rows(plan, 3).detach(), torch.randn(8, 11, 3),
            torch.randn(70, 4), _rows(plan, 7).detach(), torch.randn(11, 4), torch.randn(8, 11, 3), plan.slot_of,
            plan.entry_of, *plan.segments, 2,
        ),
        "gate_rows": lambda: (
            torch.randn(70, 4, 2, 3, requires_grad=True), plan.slot_of, plan.entry_of, plan.chunk_segment,
        ),
        "gate_rows_bwd": lambda: (
            torch.randn(2, plan.entry_of.shape[0], 3), plan.slot_of, plan.entry_of, plan.chunk_segment, 4,
        ),
        "gated_rms_norm": lambda: (*(torch.randn(3, 4, requires_grad=True) for _ in range(2)), torch.rand(4), 1e-6),
        "gated_rms_norm_bwd": lambda: (*(torch.randn(3, 4) for _ in range(3)), torch.rand(4), 1e-6),
        "grouped_linear": lambda: (_rows(plan, 5), torch.randn(4, 6, 5, requires_grad=True), plan.group_offset),
        "grouped_linear_dweight": lambda: (_rows(plan, 6).detach(), _rows(plan, 5).detach(), plan.group_offset),
        "small_linear": lambda: (torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)),
        "small_linear_bwd": lambda: (torch.randn(5, 3), torch.randn(5, 4), torch.randn(3, 4)),
        "linear_cross_entropy": lambda: (
            torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True),
            torch.tensor([0, 5, -100, 2, 1]), -100, True,
        ),
        "chunk_rule_bwd": _chunk_bwd,
        "decode_linear": lambda: (
            torch.randn(2, 6), torch.randn(5, 6), torch.rand(6), torch.randn(3, 6), True, False, 1e-6,
        ),
        "decode_linear_": lambda: (torch.randn(2, 5), torch.randn(2, 6), torch.randn(5, 6)),
        "decode_step": _decode_step,
        "decode_step_": _decode_step,
    }  # fmt: skip
    for rule in RULES.values():
        samples[f"chunk_{rule.op}"] = _chunk(rule.name)
        samples[f"recurrent_{rule.op}"] = _recurrent(rule.name, True)
        samples[f"recurrent_{rule.op}_"] = _recurrent(rule.name, False)
    return samples


def test_every_operator_has_a_sample() -> None:
    assert sorted(f"mom::{name}" for name in samples()) == OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    name = name.removeprefix("mom::")
    torch.library.opcheck(getattr(torch.ops.mom, name).default, samples()[name]())


def test_schemas_are_the_recorded_ones() -> None:
    # A .pt2 file carries these: after the first release only append arguments with defaults.
    recorded = Path(ops.__file__).with_name("schemas.txt").read_text().splitlines()
    schemas = sorted(str(getattr(torch.ops.mom, name.removeprefix("mom::")).default._schema) for name in OPERATORS)
    assert schemas == recorded
