"""What the operator tests share: tolerances, errors, plans of the aligned layout, hostile inputs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mom_compile.export.views import VIEWS
from mom_compile.ops import RULES, DispatchPlan, dispatch, l2_norm

# The CPU by default; TRITON_INTERPRET=1 runs the same tests through the Triton kernels.
ON_GPU = os.environ.get("MOM_TEST_DEVICE", "cpu") != "cpu"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Largest ||a - b|| / ||b|| of a result against the float64 reference, by dtype of the inputs.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


def cover(*axes: Iterable[Any], keep: Callable[..., bool]) -> list[Any]:
    """Every combination as parameters; of those that are interpreted, which is slow, make test has what ``keep`` says.

    That is to be every value of each axis, with each value of the others where they meet in the code.
    """
    return [
        pytest.param(*values, marks=[] if keep(*values) or not INTERPRET else [pytest.mark.slow])
        for values in itertools.product(*axes)
    ]


def relative(actual: Tensor, expected: Tensor) -> float:
    """``||a - b|| / ||b||``; the plain difference where b is zero up to float64 rounding."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale > 1e-12 else difference


def launches(graph: Any) -> list[str]:
    """Operators of the nodes of an ONNX graph that ONNX Runtime runs for a batch of fixed size.

    Not those that only rename axes, nor what depends on no input's values: that is computed when a session is made.
    """
    changing = {value.name for value in graph.input}
    found = []
    for node in graph.node:
        if node.op_type != "Shape" and changing.intersection(node.input):
            changing.update(node.output)
            found += [] if node.op_type in VIEWS else [node.op_type]
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = relative(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, tolerance {tolerance:.0e}"


def assert_parity(
    function: Callable[..., object],
    reference: Callable[..., object],
    inputs: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """Outputs and every gradient of ``function`` against ``reference`` on the same inputs."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    actual, expected = _floats(function(*leaves)), _floats(reference(*leaves))
    if tolerance is None:
        tolerance = TOLERANCES[leaves[0].dtype]
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, tolerance, f"output {index}")
    weights = [torch.randn_like(e) for e in expected]
    differentiable = [x for x in leaves if x.requires_grad]
    grads = []
    for outputs in (actual, expected):
        total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
        assert isinstance(total, Tensor)
        grads.append(torch.autograd.grad(total, differentiable, allow_unused=True))
    for index, (a, e) in enumerate(zip(*grads, strict=True)):
        if a is None or e is None:
            assert a is e or (e is not None and not e.any()) or (a is not None and not a.any())
            continue
        assert_close(a, e, tolerance * 2, f"gradient of input {index}")


def _floats(outputs: object) -> list[Tensor]:
    items = outputs if isinstance(outputs, tuple) else (outputs,)
    return [x for x in items if isinstance(x, Tensor) and x.is_floating_point()]


def random_indices(tokens: int, num_memories: int, topk: int) -> Tensor:
    """``[T, k]`` different random memories for each token."""
    return torch.rand(tokens, num_memories).argsort(1)[:, :topk]


def plan_cases() -> dict[str, Callable[[], tuple[DispatchPlan, int, int]]]:
    """Name -> maker of (plan, tokens, segments): ragged, empty and lopsided ones."""

    def case(
        bounds: Sequence[int], num_memories: int, topk: int, shared: bool, one: bool = False, mask: bool = False
    ) -> Callable[[], tuple[DispatchPlan, int, int]]:
        def make() -> tuple[DispatchPlan, int, int]:
            tokens = bounds[-1]
            indices = random_indices(tokens, num_memories, topk)
            if one:
                indices = torch.arange(topk).expand(tokens, topk)
            valid = torch.rand(tokens) > 0.2 if mask else None
            plan = dispatch(indices, torch.tensor(bounds), num_memories, valid, shared)
            return plan, tokens, (len(bounds) - 1) * (num_memories + shared)

        return make

    return {
        "one-token": case([0, 1], 4, 2, True),
        "7-tokens": case([0, 7], 3, 1, False),
        "63-tokens": case([0, 63], 1, 1, False),
        "64-tokens": case([0, 64], 1, 1, True),
        "65-tokens": case([0, 65], 2, 2, False),
        "200-tokens": case([0, 200], 4, 2, True),
        "documents": case([0, 3, 3, 68, 70, 130], 4, 2, True),
        "all-to-one-memory": case([0, 90], 4, 1, True, one=True),
        "masked": case([0, 50, 100], 3, 2, True, mask=True),
    }


def rule_inputs(
    rule: str,
    lead: tuple[int, ...],
    heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 8,
    kind: str = "random",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v, g, beta of a rule; ``lead`` are the leading axes. ``kind`` names a hostile variant."""
    q, k = l2_norm(torch.randn(*lead, heads, key_dim)), torch.randn(*lead, heads, key_dim)
    if kind == "correlated":  # nearly one direction: the case in which a doubling inverse explodes
        k = torch.randn(heads, key_dim) + 0.01 * k
    k = l2_norm(k)
    v = torch.randn(*lead, value_heads, value_dim)
    g = beta = None
    if RULES[rule].gate == "scalar":
        g = -torch.rand(*lead, value_heads)
        if kind == "correlated":
            g = g * 1e-3
        if kind == "strong-decay":
            g = torch.where(torch.rand_like(g) < 0.2, -1e4, g * 0.1)
        if kind == "no-decay":
            g = torch.zeros_like(g)
    elif RULES[rule].gate == "head":
        g = -torch.rand(value_heads)
        if kind == "strong-decay":
            g = torch.full_like(g, -1e4)
    if RULES[rule].delta:
        beta = torch.rand(*lead, value_heads)
        if kind == "correlated":
            beta = 1 - 1e-3 * beta
        if kind == "beta-edges":
            beta = (beta > 0.5).float()
    if kind == "zero-rows":
        zero = (torch.rand(*lead, 1, 1) < 0.3).float()
        q, k = q * (1 - zero), k * (1 - zero)
    return q.to(dtype), k.to(dtype), v.to(dtype), g, None if beta is None else beta.to(dtype)


KINDS = ("random", "correlated", "strong-decay", "no-decay", "beta-edges", "zero-rows")
