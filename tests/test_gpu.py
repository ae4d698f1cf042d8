"""What only a CUDA device can show: no host syncs, CUDA graphs, bit-equal repeats, bad tables that stay in bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import tiny_model
from support import assert_close, relative
from torch import Tensor
from torch._dynamo.utils import counters

import mom_compile.ops as ops
from mom_compile import MoMForCausalLM
from mom_compile.decode import DecodeSession
from mom_compile.ops import RULES
from mom_compile.ops.grouped_linear import grouped_linear_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_default_device(before)


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length))


def _step(model: MoMForCausalLM, ids: Tensor) -> Tensor:
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("rule", RULES)
def test_gpu_float32_against_cpu_float64(rule: str) -> None:
    """Logits, states and every parameter's gradient, with the reference's routing."""
    model = tiny_model(rule, head_dim=32).cuda()
    exact = tiny_model(rule, head_dim=32).double().cpu()
    exact.load_state_dict({name: value.double().cpu() for name, value in model.state_dict().items()})
    ids = _ids(3, 200)
    mask = torch.ones(3, 200, dtype=torch.int64)
    mask[0, :17] = 0
    expected = exact(ids.cpu(), attention_mask=mask.cpu(), labels=ids.cpu(), return_logits=True)
    indices = [logits.topk(2).indices for logits in expected.router_logits]
    out = model(
        ids, attention_mask=mask, labels=ids, return_logits=True, router_indices=[index.cuda() for index in indices]
    )
    expected.loss.backward()
    out.loss.backward()
    assert relative(out.logits.cpu(), expected.logits) < 1e-5
    for layer, state in enumerate(expected.state):
        for name, value in state.items():
            assert relative(out.state[layer][name].cpu(), value) < 1e-5, (layer, name)
    reference = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        want = reference[name].grad
        if want is not None and want.any():
            assert parameter.grad is not None and relative(parameter.grad.cpu(), want) < 1e-4, name


def test_no_host_sync() -> None:
    model = tiny_model().train()
    ids = _ids(2, 300)
    bounds = torch.tensor([0, 100, 100, 300])
    mask = torch.ones(2, 300, dtype=torch.int64)

    def everything() -> None:
        _step(model, ids)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        packed = ids[:1]
        model(packed, labels=packed, cu_seqlens=bounds).loss.backward()
        with torch.no_grad():
            state = model(ids).state
            model(ids[:, :1], state=state)

    everything()  # kernels compile here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_triton_compile_after_the_first_shapes() -> None:
    from triton.runtime.jit import JITFunction

    model = tiny_model().train()
    compiled = torch.compile(model, fullgraph=True)

    def step(batch: int, length: int) -> None:
        model.zero_grad()
        ids = _ids(batch, length)
        compiled(ids, labels=ids).loss.backward()

    for batch, length in [(2, 100), (3, 130)]:
        step(batch, length)
    graphs = counters["stats"]["unique_graphs"]
    built: list[object] = []
    JITFunction.compiled_hook = lambda *args, **options: built.append(options) or False  # type: ignore[attr-defined,func-returns-value]
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for index in range(20):
                step(2 + index % 4, 64 + 29 * index)
    finally:
        JITFunction.compiled_hook = None  # type: ignore[attr-defined]
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert not built, built[:2]


@torch.no_grad()
def test_reduce_overhead_decode() -> None:
    """100 steps through CUDA graphs, the state carried from call to call."""
    model = tiny_model()
    decode = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    ids = _ids(2, 120)
    expected = model(ids).logits
    state = model(ids[:, :20]).state
    for t in range(20, 120):
        torch.compiler.cudagraph_mark_step_begin()
        out = decode(ids[:, t : t + 1], state=state)
        state = tuple({name: value.clone() for name, value in layer.items()} for layer in out.state)
        assert_close(out.logits[:, 0], expected[:, t], 5e-5, f"token {t}")


@pytest.mark.parametrize(
    "bounds", [[0, 64, 64, 192, 320], [0, 3, 70, 70, 71], [0, 0, 0, 0, 0], [0, 100, 200, 300, 400]]
)
def test_grouped_linear_in_bfloat16(bounds: list[int]) -> None:
    """By the library's grouped product where it serves: empty groups, ragged ones, rows of no group."""
    x = torch.randn(400, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 96, 64, dtype=torch.bfloat16, requires_grad=True)
    offset = torch.tensor(bounds, dtype=torch.int32)
    y = ops.grouped_linear(x, weight, offset)
    expected = grouped_linear_reference(x, weight, offset)
    grad = torch.randn_like(y)
    actual_grads = torch.autograd.grad(y, (x, weight), grad)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad.double())
    for actual, wanted in zip((y, *actual_grads), (expected, *expected_grads), strict=True):
        assert torch.isfinite(actual).all()
        assert relative(actual, wanted) < 1e-2 if wanted.any() else not actual.any()
    assert not y[bounds[-1] :].any()


def test_repeats_are_bit_equal() -> None:
    model = tiny_model().bfloat16().train()
    ids = _ids(4, 300)
    first: list[Tensor] = []
    for _ in range(20):
        loss = _step(model, ids)
        now = [loss, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


def test_bad_values_stay_in_bounds() -> None:
    """Wrong tables on a GPU give wrong numbers or NaN, never a fault."""
    indices = torch.tensor([[0, 9], [-3, 1], [2, 1 << 40]])
    plan = ops.dispatch(indices, torch.tensor([0, 99]), 3)
    x = torch.randn(3, 8)
    rows = ops.permute(x, plan)
    ops.combine(rows.view(-1, 1, 8), torch.rand(3, 2), plan)
    wild = torch.randint(-(1 << 30), 1 << 30, (plan.segment_start.shape[0],), dtype=torch.int32)
    wild_bounds = torch.tensor([5, 1 << 30, -7, 1 << 20], dtype=torch.int32)
    chunk = torch.full_like(plan.chunk_segment, 1 << 20)
    q = torch.randn(plan.entry_of.shape[0], 2, 16)
    gate = -torch.rand(q.shape[0], 2)
    save = 15
    for tables in ((wild, wild, chunk), (wild, wild.abs(), plan.chunk_segment)):
        out = torch.ops.mom.chunk_gated_delta_rule(q, q, q, gate, gate.exp(), None, *tables, 0.25, save)
        torch.ops.mom.chunk_rule_bwd(q, q, q, gate, gate.exp(), None, *tables, *out[2:], q, None, 0.25)
        torch.ops.mom.grouped_linear(q.flatten(1).bfloat16(), torch.randn(3, 16, 32).bfloat16(), wild_bounds)
        torch.ops.mom.short_conv(q.flatten(1), torch.randn(32, 4), None, *tables, "silu")
    state = torch.randn(2, 2, 16, 16)
    torch.ops.mom.recurrent_gated_delta_rule(
        q[None, :5], q[None, :5], q[None, :5], gate[None, :5], gate[None, :5].exp(), state,
        torch.tensor([7, -1]), torch.tensor([-50, 1 << 40, 3]), 0.25,
    )  # fmt: skip
    torch.cuda.synchronize()


@torch.no_grad()
def test_a_decode_session_waits_for_nothing_and_repeats() -> None:
    model = tiny_model(head_dim=32).bfloat16()
    state = model(_ids(3, 40)).state
    session, ids = DecodeSession(model, 3), _ids(8, 3)
    results = []
    for _ in range(50):
        session.load(state)
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = torch.stack([session.step(ids[t]).clone() for t in range(8)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((logits, session.state()))
    for logits, after in results[1:]:
        assert torch.equal(logits, results[0][0])
        for a, b in zip(after, results[0][1], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
