"""The training kernels in bfloat16 on a GPU: accuracy, bit-equal repeats, nothing outside their buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import relative
from torch import Tensor

import mom_compile.ops as ops
from mom_compile.ops import RULES, DispatchPlan
from mom_compile.ops.memory_rule import chunk_rows, segments_reference

pytestmark = pytest.mark.gpu

# RMS of the error over RMS of the reference, in bfloat16.
LIMIT, GATE_LIMIT = 0.008, 0.02
DIMS = [(16, 16), (32, 32), (64, 64), (100, 100), (128, 128), (256, 256), (64, 128), (256, 128), (100, 48)]
GUARD = 4096


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


def _plan() -> DispatchPlan:
    """Ragged documents, one of them empty, one of a single token, and a memory that nobody selects."""
    bounds = torch.tensor([0, 130, 130, 131, 400])
    indices = torch.rand(400, 3).argsort(1)[:, :2]
    return ops.dispatch(indices, bounds, 4, None, True)


def _inputs(rule: str, plan: DispatchPlan, key: int, value: int, kind: str) -> list[Tensor]:
    """q, k, v, and the rule's g and beta, zero on pad rows; the gates in float32."""
    rows, heads = plan.entry_of.shape[0], 2
    real = (plan.entry_of >= 0).view(-1, 1, 1)
    k = torch.randn(rows, heads, key)
    if kind == "correlated":
        k = torch.randn(heads, key) + 0.3 * k  # cosine about 0.92
    q, k = ops.l2_norm(torch.randn(rows, heads, key)) * real, ops.l2_norm(k) * real
    inputs = [x.bfloat16() for x in (q, k, torch.randn(rows, heads, value) * real)]
    if RULES[rule].gate == "scalar":
        g = -torch.rand(rows, heads) * {"random": 0.2, "correlated": 1e-3, "strong-decay": 20.0}[kind]
        inputs.append(g * real[..., 0])
    if RULES[rule].gate == "head":
        inputs.append(-torch.rand(heads) * 0.1)
    if RULES[rule].delta:
        beta = torch.rand(rows, heads)
        inputs.append((1 - 1e-3 * beta if kind == "correlated" else beta) * real[..., 0])
    return inputs


def _run(rule: str, inputs: list[Tensor], scale: float, plan: DispatchPlan, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v, *rest = leaves
    g = rest.pop(0) if RULES[rule].gate != "none" else None
    beta = rest.pop(0) if RULES[rule].delta else None
    o, final_state = chunk_rows(rule, q, k, v, g, beta, scale, None, plan.segments)
    return [o.detach(), final_state.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))]


def _names(rule: str) -> list[str]:
    names = ["o", "final_state", "dq", "dk", "dv"]
    return names + ["dg"] * (RULES[rule].gate != "none") + ["dbeta"] * RULES[rule].delta


def _check(rule: str, key: int, value: int, kind: str) -> None:
    torch.manual_seed(0)
    plan = _plan()
    inputs = _inputs(rule, plan, key, value, kind)
    grad = (torch.randn(plan.entry_of.shape[0], 2, value) * (plan.entry_of >= 0).view(-1, 1, 1)).bfloat16()
    actual = _run(rule, inputs, key**-0.5, plan, grad)

    with torch.device("cpu"):
        leaves = [x.cpu().double().requires_grad_() for x in inputs]
        q, k, v, *rest = leaves
        g = rest.pop(0) if RULES[rule].gate != "none" else None
        if g is not None and g.dim() == 1:
            g = g.expand(q.shape[0], -1)
        beta = rest.pop(0) if RULES[rule].delta else None
        tables = plan.segment_start.cpu(), plan.segment_length.cpu()
        o, final_state = segments_reference(q, k, v, g, beta, key**-0.5, None, *tables)
        expected = [o, final_state, *torch.autograd.grad(o, leaves, grad.cpu().double())]
    for name, a, e in zip(_names(rule), actual, expected, strict=True):
        assert torch.isfinite(a).all(), name
        limit = GATE_LIMIT if name in ("dg", "dbeta") else LIMIT
        error = relative(a.cpu(), e.detach())
        assert error <= limit, f"{name}: {error:.2e}, limit {limit}"


@pytest.mark.parametrize(("key", "value"), DIMS)
def test_accuracy_by_head_dims(key: int, value: int) -> None:
    _check("gated_delta", key, value, "random")


@pytest.mark.parametrize("kind", ["correlated", "strong-decay"])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (256, 256)])
def test_accuracy_on_hostile_inputs(key: int, value: int, kind: str) -> None:
    _check("gated_delta", key, value, kind)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "gated_delta"])
@pytest.mark.parametrize(("key", "value"), [(64, 128), (256, 256)])
def test_accuracy_by_rule(rule: str, key: int, value: int) -> None:
    _check(rule, key, value, "random")


@pytest.mark.parametrize("rule", ["gated_delta", "delta", "linear"])
@pytest.mark.parametrize("chains", ["few", "many"])
@pytest.mark.parametrize(("key", "value"), [(64, 64), (100, 100), (128, 128), (256, 256)])
def test_repeats_are_bit_equal(key: int, value: int, chains: str, rule: str) -> None:
    """Few chains take the scans' narrow blocks. Other work runs in between, so that shared memory changes hands."""
    bounds = torch.tensor([0, 2048]) if chains == "few" else torch.arange(41) * 64
    tokens = int(bounds[-1])
    plan = ops.dispatch(torch.empty(tokens, 0, dtype=torch.int64), bounds, 0, None, True)
    inputs = _inputs(rule, plan, key, value, "random")
    grad = torch.randn(plan.entry_of.shape[0], 2, value).bfloat16()
    noise = torch.randn(512, 512).bfloat16()
    first = _run(rule, inputs, key**-0.5, plan, grad)
    for _ in range(50):
        noise @ noise
        again = _run(rule, inputs, key**-0.5, plan, grad)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("rule", ["gated_delta", "delta", "mamba2"])
def test_repeats_are_bit_equal_on_a_full_gpu(rule: str) -> None:
    """Several thread blocks on every multiprocessor, as in training: races show there first."""
    bounds = torch.arange(9) * 2048
    indices = torch.rand(8 * 2048, 4).argsort(1)[:, :2]
    plan = ops.dispatch(indices, bounds, 4, None, True)
    inputs = _inputs(rule, plan, 256, 256, "random")
    grad = (torch.randn(plan.entry_of.shape[0], 2, 256) * (plan.entry_of >= 0).view(-1, 1, 1)).bfloat16()
    first = _run(rule, inputs, 1 / 16, plan, grad)
    for _ in range(20):
        again = _run(rule, inputs, 1 / 16, plan, grad)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


class _Guarded:
    """Allocations of the launches with NaN in front of them and behind them."""

    def __init__(self) -> None:
        self.bands: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = int(torch.Size(shape).numel())
        # A backward runs in a thread of its own, which knows nothing of the default device.
        whole = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device="cuda")
        self.bands += [whole[:GUARD], whole[GUARD + count :]]
        return whole[GUARD : GUARD + count].view(shape)

    def place(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return self.empty(tuple(x.shape), x.dtype).copy_(x)

    def check(self) -> None:
        assert self.bands and all(torch.isnan(band).all() for band in self.bands)


@pytest.mark.parametrize(("key", "value"), [(64, 64), (100, 48), (256, 256)])
def test_kernels_keep_to_their_buffers(monkeypatch: pytest.MonkeyPatch, key: int, value: int) -> None:
    """NaN around every input and output of every launch: none is read, or it would show, and none is written."""
    from mom_compile.ops.memory_rule import launch as module

    plan = _plan()
    inputs = _inputs("gated_delta", plan, key, value, "random")
    grad = (torch.randn(plan.entry_of.shape[0], 2, value) * (plan.entry_of >= 0).view(-1, 1, 1)).bfloat16()
    expected = _run("gated_delta", inputs, key**-0.5, plan, grad)
    guarded = _Guarded()
    run, kernels = module._run, set()

    def guarded_run(kernel: Any, heads: Any, programs: int, *args: Any) -> None:
        kernels.add(kernel)
        placed = [guarded.place(x) if isinstance(x, Tensor) else x for x in args]
        run(kernel, heads, programs, *placed)
        for before, after in zip(args, placed, strict=True):
            if isinstance(before, Tensor) and after is not before:
                before.copy_(after)

    monkeypatch.setattr(module, "_run", guarded_run)
    actual = _run("gated_delta", inputs, key**-0.5, plan, grad)
    guarded.check()
    assert len(kernels) == 7
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_conv_qkv_keeps_to_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    from mom_compile.ops.conv_qkv import launch as module

    plan = _plan()
    real = (plan.entry_of >= 0).unsqueeze(1)
    leaves = [torch.randn(400, 200), torch.randn(plan.entry_of.shape[0], 296) * real, torch.randn(496, 4)]
    leaves = [x.bfloat16().requires_grad_() for x in leaves]
    state = torch.randn(plan.segment_start.shape[0], 496, 3).bfloat16().requires_grad_()

    def step() -> list[Tensor]:
        q, k, v, final = ops.conv_qkv(leaves[0], leaves[1], leaves[2], plan, 100, state)
        total = torch.stack([x.float().square().sum() for x in (q, k, v, final)]).sum()
        grads = torch.autograd.grad(total, [*leaves, state])
        return [q, k, v, final, *grads]

    expected = step()
    guarded, launch = _Guarded(), module.launch

    def guarded_launch(kernel: Any, grid: tuple[int, ...], config: Any, *args: Any) -> None:
        placed = [guarded.place(x) if isinstance(x, Tensor) else x for x in args]
        launch(kernel, grid, config, *placed)
        for before, after in zip(args, placed, strict=True):
            if isinstance(before, Tensor) and after is not before:
                before.detach().copy_(after.detach())

    monkeypatch.setattr(module, "launch", guarded_launch)
    actual = step()
    guarded.check()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim", "values"), [(2, 256, 512), (4, 64, 256), (1, 100, 48), (3, 16, 48)])
def test_conv_qkv_accuracy(heads: int, dim: int, values: int, dtype: torch.dtype) -> None:
    plan = _plan()
    size = heads * dim
    real = (plan.entry_of >= 0).unsqueeze(1)
    leaves = [torch.randn(400, size), torch.randn(plan.entry_of.shape[0], size + values) * real]
    leaves = [x.to(dtype).requires_grad_() for x in (*leaves, torch.randn(2 * size + values, 4))]
    outputs = ops.conv_qkv(leaves[0], leaves[1], leaves[2], plan, dim)[:3]
    weights = [torch.randn_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights)
    with torch.device("cpu"):
        exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
        tables = [table.cpu() for table in plan]
        wanted = ops.conv_qkv(exact[0], exact[1], exact[2], DispatchPlan(*tables), dim)[:3]
        expected = torch.autograd.grad(wanted, exact, [w.cpu().double() for w in weights])
    limit = LIMIT if dtype == torch.bfloat16 else 5e-6
    for a, e in zip((*outputs, *grads), (*wanted, *expected), strict=True):
        assert relative(a.detach().cpu(), e.detach()) <= limit
