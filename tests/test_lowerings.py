"""The plain-operator forms of the rules against the float64 recurrence, hostile inputs included."""

from __future__ import annotations

import pytest
import torch
from support import KINDS, assert_close, rule_inputs

from mom_compile.export.lowerings import chunked, decompositions, one_token
from mom_compile.ops import RULES
from mom_compile.ops.memory_rule import recurrence_reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_chunked(rule: str, kind: str) -> None:
    for length in (1, 64, 130):
        q, k, v, g, beta = rule_inputs(rule, (2, length), heads=4, kind=kind)
        if g is not None and g.dim() == 1:
            g = g.expand(2, length, 4)
        state = torch.randn(2, 4, 16, 8)
        o, final = chunked(RULES[rule], q, k, v, g, beta, state, 0.25)
        expected, expected_final = recurrence_reference(q, k, v, g, beta, 0.25, state)
        tolerance = 1e-4 if kind == "correlated" else 1e-5
        assert_close(o, expected, tolerance, "o")
        assert_close(final, expected_final, tolerance, "final state")


@pytest.mark.parametrize("rule", RULES)
def test_one_token(rule: str) -> None:
    q, k, v, g, beta = rule_inputs(rule, (3, 1), heads=4, kind="strong-decay")
    if g is not None and g.dim() == 1:
        g = g.expand(3, 1, 4)
    state = torch.randn(3, 4, 16, 8)
    o, final = one_token(RULES[rule], q, k, v, g, beta, state, 0.25)
    expected, expected_final = recurrence_reference(q, k, v, g, beta, 0.25, state)
    assert_close(o, expected, 1e-5, "o")
    assert_close(final, expected_final, 1e-5, "final state")


def test_every_rule_has_a_lowering() -> None:
    for target in ("onnxruntime", "portable"):
        for decode in (False, True):
            table = decompositions(target, decode)
            for rule in RULES.values():
                assert getattr(torch.ops.mom, f"recurrent_{rule.op}").default in table
