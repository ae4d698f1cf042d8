"""The five rules, chunked and sequential, against the float64 token recurrence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    INTERPRET,
    KINDS,
    ON_GPU,
    TOLERANCES,
    assert_close,
    assert_parity,
    cover,
    plan_cases,
    relative,
    rule_inputs,
)
from torch import Tensor

import mom_compile.ops as ops
from mom_compile.ops import RULES, permute
from mom_compile.ops.memory_rule import chunk_rows, recurrence_reference, segments_reference
from mom_compile.ops.memory_rule.op import CHUNK_OPS
from mom_compile.ops.memory_rule.rules import SAVE_ALL, SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW

CASES = plan_cases()


def _split(rule: str, extra: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    rest = list(extra)
    g = rest.pop(0) if RULES[rule].gate != "none" else None
    beta = rest.pop(0) if RULES[rule].delta else None
    return g, beta


def _dense_reference(rule: str, scale: float, with_state: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def reference(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        state = rest[-1] if with_state else None
        g, beta = _split(rule, rest)
        if g is not None and g.dim() == 1:
            g = g.expand(*v.shape[:3])
        return recurrence_reference(q, k, v, g, beta, scale, state)

    return reference


def _public(name: str, rule: str, with_state: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    function = getattr(ops, f"{name}_{RULES[rule].op}")

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        extra = [x for x in _split(rule, rest) if x is not None]
        return function(q, k, v, *extra, initial_state=rest[-1] if with_state else None)

    return call


def _case(rule: str, batch: int, length: int, kind: str, with_state: bool = True) -> list[Tensor]:
    inputs = [x for x in rule_inputs(rule, (batch, length), kind=kind) if x is not None]
    return [*inputs, *([torch.randn(batch, 4, 16, 8)] if with_state else [])]


@pytest.mark.parametrize(
    ("rule", "length"),
    cover(RULES, [1, 7, 63, 64, 65, 200], keep=lambda rule, length: rule == "gated_delta" or length == 65),
)
def test_chunk_lengths(rule: str, length: int) -> None:
    inputs = _case(rule, 2 if length < 64 else 1, length, "random")
    assert_parity(_public("chunk", rule, True), _dense_reference(rule, 16**-0.5, True), inputs)


@pytest.mark.parametrize(
    ("rule", "key_dim", "value_dim"),
    [
        *(("gated_delta", key_dim, value_dim) for key_dim, value_dim in ((20, 36), (100, 100))),
        pytest.param("gated_delta", 128, 128, marks=[pytest.mark.slow] * INTERPRET),
        *(("linear", key_dim, value_dim) for key_dim, value_dim in ((20, 36), (100, 100))),
        pytest.param("linear", 128, 128, marks=pytest.mark.slow),  # the tiles of 100, none of them ragged
    ],
)
def test_head_dims(rule: str, key_dim: int, value_dim: int) -> None:
    inputs = [x for x in rule_inputs(rule, (1, 70), 1, 1, key_dim, value_dim) if x is not None]
    inputs.append(torch.randn(1, 1, key_dim, value_dim))
    for name in ("chunk", "recurrent"):
        assert_parity(_public(name, rule, True), _dense_reference(rule, key_dim**-0.5, True), inputs)


# What each kind is hostile to: of the gates, of beta, or of any.
HOSTILE = {
    "delta": ("correlated", "beta-edges"),
    "mamba2": ("strong-decay", "no-decay"),
    "retention": ("strong-decay",),
    "linear": ("zero-rows",),
}


@pytest.mark.parametrize(
    ("rule", "kind"), cover(RULES, KINDS[1:], keep=lambda rule, kind: kind in HOSTILE.get(rule, KINDS))
)
def test_chunk_hostile(rule: str, kind: str) -> None:
    # Correlated keys amplify rounding: the float32 reference itself is off by 2e-5 there.
    tolerance = 1e-4 if kind == "correlated" else None
    inputs = _case(rule, 1, 130, kind, with_state=False)
    assert_parity(_public("chunk", rule, False), _dense_reference(rule, 16**-0.5, False), inputs, tolerance)


# Every plan with the rule that has all there is to place; with the two other kinds of gate, one of each kind of plan.
PLANS = {
    "gated_delta": tuple(CASES),
    "retention": ("one-token", "65-tokens", "documents", "masked"),
    "linear": ("7-tokens", "64-tokens", "documents"),
}
if INTERPRET:  # lengths are those of test_chunk_lengths
    PLANS = {
        "gated_delta": ("one-token", "65-tokens", "documents", "all-to-one-memory", "masked"),
        "retention": ("masked",),
        "linear": ("7-tokens",),
    }


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        pytest.param(rule, name, id=f"{rule}-{name}", marks=[] if name in plans else [pytest.mark.slow])
        for rule, plans in PLANS.items()
        for name in CASES
    ],
)
def test_chunk_on_a_routed_plan(rule: str, name: str) -> None:
    plan, tokens, segments = CASES[name]()
    q, k, v, g, beta = rule_inputs(rule, (tokens,))
    place = [
        None if x is None else x if x.dim() == 1 else permute(x.flatten(1), plan).view(-1, *x.shape[1:])
        for x in (q, k, v, g, beta)
    ]
    inputs = [x for x in place if x is not None]
    real = (plan.entry_of >= 0).view(-1, 1, 1)  # nobody reads a pad row, so none gets a gradient

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        o, final_state = chunk_rows(rule, q, k, v, *_split(rule, rest), 0.25, rest[-1], plan.segments)
        return o * real, final_state

    def reference(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        g, beta = _split(rule, rest)
        g = g.expand(v.shape[0], -1) if g is not None and g.dim() == 1 else g
        return segments_reference(q, k, v, g, beta, 0.25, rest[-1], plan.segment_start, plan.segment_length)

    state = torch.randn(segments, 4, 16, 8)
    assert_parity(function, reference, [*inputs, state])
    # A memory that no token selected keeps its state bit for bit.
    final_state = function(*inputs, state)[1]
    empty = plan.segment_length == 0
    assert torch.equal(final_state[empty], state[empty])


@pytest.mark.parametrize(
    ("case", "save"),
    cover(
        [("gated_delta", True), ("gated_delta", False), ("delta", True)],
        [0, SAVE_INVERSE | SAVE_SCORES | SAVE_V_NEW, SAVE_ALL],
        keep=lambda case, save: case == ("gated_delta", True) or save == (SAVE_ALL if case[0] == "delta" else 0),
    ),
)
def test_gradients_from_what_was_saved(case: tuple[str, bool], save: int) -> None:
    """What the forward did not keep is computed again; what it keeps is zero in chunks that no segment uses."""
    rule, with_state = case
    plan, tokens, segments = CASES["masked"]()
    inputs = [x for x in rule_inputs(rule, (tokens,)) if x is not None]
    inputs = [permute(x.flatten(1), plan).view(-1, *x.shape[1:]) for x in inputs]
    inputs += [torch.randn(segments, 4, 16, 8)] * with_state
    tables = plan.segment_start, plan.segment_length
    real = (plan.entry_of >= 0).view(-1, 1, 1)
    saved: list[Tensor] = []

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        arguments = rest if with_state else (*rest, None)
        o, final_state, *saved[:] = CHUNK_OPS[rule](q, k, v, *arguments, *plan.segments, 0.25, save)
        return o * real, final_state

    def reference(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return segments_reference(q, k, v, *_split(rule, rest), 0.25, rest[-1] if with_state else None, *tables)

    assert_parity(function, reference, inputs)
    unused = plan.chunk_segment < 0
    assert unused.any()
    for kept in saved:
        if kept.numel():
            assert not kept.reshape(unused.shape[0], -1)[unused].any()


@pytest.mark.parametrize(
    ("rule", "length"), cover(RULES, [1, 3, 70], keep=lambda rule, length: rule == "gated_delta" or length == 3)
)
def test_recurrent(rule: str, length: int) -> None:
    inputs = _case(rule, 2, length, "random")
    assert_parity(_public("recurrent", rule, True), _dense_reference(rule, 16**-0.5, True), inputs)


@pytest.mark.parametrize("rule", RULES)
def test_recurrent_with_state_indices(rule: str) -> None:
    inputs = rule_inputs(rule, (3, 2))
    extra = [x for x in inputs[3:] if x is not None]
    pool = torch.randn(6, 4, 16, 8)
    before = pool.clone()
    indices = torch.tensor([4, -1, 1])
    function = getattr(ops, f"recurrent_{RULES[rule].op}")
    leaves = [x.clone().requires_grad_() for x in (*inputs[:3], *extra, pool)]
    o, after = function(*leaves[:-1], initial_state=leaves[-1], state_indices=indices)
    direct, states = function(*inputs[:3], *extra, initial_state=pool[[4, 0, 1]])
    assert torch.equal(pool, before)
    assert torch.equal(o[[0, 2]], direct[[0, 2]]) and not o[1].any()
    assert torch.equal(after[[4, 1]], states[[0, 2]])
    assert torch.equal(after[[0, 2, 3, 5]], pool[[0, 2, 3, 5]])
    grads = torch.autograd.grad(o.sum() + (after * torch.arange(6.0).view(6, 1, 1, 1)).sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][1].any() and torch.equal(grads[-1][3], torch.full_like(pool[3], 3.0))
    with torch.no_grad():
        in_place = getattr(ops, f"recurrent_{RULES[rule].op}_")(*inputs[:3], *extra, state=pool, state_indices=indices)
    assert torch.equal(in_place, o) and torch.equal(pool, after)


@pytest.mark.parametrize("rule", cover(["gated_delta", "mamba2", "retention"], keep=lambda rule: rule != "mamba2"))
def test_documents_equal_the_documents_alone(rule: str) -> None:
    bounds = [0, 3, 3, 70, 135]
    inputs = rule_inputs(rule, (1, 135))
    state = torch.randn(4, 4, 16, 8)
    for name in ("chunk", "recurrent"):
        function = getattr(ops, f"{name}_{RULES[rule].op}")
        extra = [x for x in inputs[3:] if x is not None]
        o, final_state = function(*inputs[:3], *extra, initial_state=state, cu_seqlens=torch.tensor(bounds))
        for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            part = [x if x.dim() == 1 else x[:, start:end] for x in (*inputs[:3], *extra)]
            alone, alone_state = function(*part, initial_state=state[n : n + 1])
            assert torch.equal(o[:, start:end], alone)
            assert torch.equal(final_state[n : n + 1], alone_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v, g, beta = rule_inputs("gated_delta", (1, 130), dtype=dtype)
    assert g is not None and beta is not None
    o, state = ops.chunk_gated_delta_rule(q, k, v, g, beta)
    expected, expected_state = recurrence_reference(q, k, v, g, beta, 0.25)
    assert o.dtype == dtype and state.dtype == torch.float32
    assert_close(o, expected, TOLERANCES[dtype], "o")
    assert_close(state, expected_state, TOLERANCES[dtype], "state")
    initial = torch.randn(1, 4, 16, 8).to(dtype)
    expected, expected_state = recurrence_reference(q, k, v, g, beta, 0.25, initial)
    for function in (ops.chunk_gated_delta_rule, ops.recurrent_gated_delta_rule):
        o, stored = function(q, k, v, g, beta, initial_state=initial)
        assert stored.dtype == dtype
        assert_close(o, expected, TOLERANCES[dtype], "o")
        assert_close(stored, expected_state, TOLERANCES[dtype], "stored state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients(dtype: torch.dtype) -> None:
    inputs = [x for x in rule_inputs("gated_delta", (1, 130), dtype=dtype) if x is not None]
    state = torch.randn(1, 4, 16, 8).to(dtype)
    assert_parity(_public("chunk", "gated_delta", True), _dense_reference("gated_delta", 0.25, True), [*inputs, state])


@pytest.mark.skipif(not INTERPRET and not ON_GPU, reason="of the kernels")
def test_states_from_v_new_are_those_of_the_forward() -> None:
    """The backward replays the writes and nothing corrects it, so the writes must be the forward's to the last bit."""
    from mom_compile.ops.memory_rule import launch

    q, k, v, g, beta = (
        x[0] for x in rule_inputs("gated_delta", (1, 512), 1, 1, 32, 32, kind="correlated") if x is not None
    )
    q, k, v = (x.bfloat16().contiguous() for x in (q, k, v))
    tables = (
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([512], dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
    )
    save = SAVE_STATES | SAVE_V_NEW
    *_, states, v_new = launch.chunk_fwd(q, k, v, g, beta, None, *tables, 32**-0.5, save)
    gates, order = launch._scan_tables(launch._heads(q, v, g, None), g, None, tables)
    _, replayed, _ = launch._scan(launch._heads(q, v, g, None), k, v_new, gates, order, None, None, tables)
    # The sums of a GPU are split differently in the two kernels: a few of the stored states round to a neighbour.
    assert relative(replayed, states) <= (0 if INTERPRET else 2e-4)


@pytest.mark.skipif(not INTERPRET and not ON_GPU, reason="of the kernels")
@pytest.mark.parametrize(
    ("rule", "key_dim", "kind"),
    [("gated_delta", 64, "correlated"), ("gated_delta", 64, "strong-decay"), ("delta", 128, "random")],
)
def test_long_segments_in_pieces(rule: str, key_dim: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two chunks, of segments that are empty, shorter than one and of several; between buffers of NaN."""
    from test_guard_bands import BAND, Guards

    from mom_compile.ops.memory_rule import launch

    # Undo what is remembered of configurations: they hold the size of a piece.
    monkeypatch.setattr(launch, "_config", inspect.unwrap(launch._config))
    monkeypatch.setattr(launch, "PIECE", 2)
    monkeypatch.setattr(launch, "_in_pieces", lambda heads, *_: heads.dtype == torch.bfloat16)
    bounds = torch.tensor([0, 0, 3, 3 + 64 * 5 - 1, 64 * 11])
    inputs = [x for x in rule_inputs(rule, (1, 64 * 11), 1, 2, key_dim, 64, kind) if x is not None]
    inputs = [*(x.bfloat16() for x in inputs[:3]), *inputs[3:]]
    state = torch.randn(4, 2, key_dim, 64)
    function = getattr(ops, f"chunk_{RULES[rule].op}")
    expected = function(*(x.double() for x in inputs), initial_state=state.double(), cu_seqlens=bounds)
    kernels: list[str] = []
    run = launch._run

    def recorded(kernel: Any, *args: Any) -> None:
        kernels.append(kernel.__name__)
        run(kernel, *args)

    monkeypatch.setattr(launch, "_run", recorded)
    with torch.no_grad(), Guards() as guards:
        o, final_state = function(*inputs, initial_state=state, cu_seqlens=bounds)
    assert [name for name in kernels if name.startswith(("chunk_scan", "chunk_piece", "chunk_join"))] == [
        "chunk_join_kernel",
        "chunk_piece_kernel",
    ]
    assert_close(o, expected[0], TOLERANCES[torch.bfloat16], "o")
    assert_close(final_state, expected[1], TOLERANCES[torch.bfloat16], "state")
    assert torch.equal(final_state[0], state[0])
    for buffer, size in guards.buffers:
        if buffer.dtype.is_floating_point:
            assert buffer[:BAND].isnan().all() and buffer[BAND + size :].isnan().all()
    function(*(x.requires_grad_() for x in inputs), initial_state=state, cu_seqlens=bounds)
    assert kernels[-2:] == ["chunk_scan_kernel", "chunk_out_kernel"]  # what a backward computes again is scanned whole


@pytest.mark.skipif(not INTERPRET and not ON_GPU, reason="of the kernels")
def test_pieces_clear_the_rows_of_no_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that belong to none, before, between and behind the segments; no state before them."""
    from test_guard_bands import Guards

    from mom_compile.ops.memory_rule import launch

    monkeypatch.setattr(launch, "_config", inspect.unwrap(launch._config))
    monkeypatch.setattr(launch, "PIECE", 2)
    q, k, v, g, beta = (x[0] for x in rule_inputs("gated_delta", (1, 640), 1, 1, 64, 64) if x is not None)
    q, k, v = (x.bfloat16().contiguous() for x in (q, k, v))
    owner = [-1, 0, 0, 0, 7, -1, 1, 1, 1, -1]
    start, length, chunks = (torch.tensor(x, dtype=torch.int32) for x in ([64, 384], [150, 192], owner))
    results = []
    for pieces in (False, True):
        monkeypatch.setattr(launch, "_in_pieces", lambda *_, pieces=pieces: pieces)
        with Guards():  # memory that holds NaN
            results.append(launch.chunk_fwd(q, k, v, g, beta, None, start, length, chunks, 0.125, 0)[:2])
    for plain, split in zip(*results, strict=True):
        assert_close(split, plain, TOLERANCES[torch.bfloat16], "in pieces")
    o = results[1][0].view(10, -1)
    assert [bool(row.any()) for row in o] == [segment in (0, 1) for segment in owner]


@pytest.mark.skipif(not INTERPRET and not ON_GPU, reason="of the kernels")
@pytest.mark.parametrize("lengths", [[], [5], [64, 0, 300, 64, 1], torch.randint(0, 9, (200,)).tolist()])
def test_scans_start_with_the_longest_segments(lengths: list[int]) -> None:
    from mom_compile.ops.memory_rule import launch

    length = torch.tensor(lengths, dtype=torch.int32)
    chunks = -(-length // 64)
    start = (chunks.cumsum(0) - chunks).int() * 64
    tables = start, length, torch.arange(len(lengths)).repeat_interleave(chunks).int()
    heads = launch._Heads(1, 1, 16, 16, torch.float32, False, False)
    _, order = launch._scan_tables(heads, None, None, tables)
    assert order.tolist() == length.argsort(descending=True, stable=True).tolist()


@pytest.mark.skipif(INTERPRET, reason="float64 always takes the PyTorch implementation")
@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule: str) -> None:
    inputs = [x.double().requires_grad_() for x in _case(rule, 1, 66, "random")]
    small = [x if x.dim() == 1 else x[..., :2, :3] if x.dim() == 4 and i < 3 else x for i, x in enumerate(inputs)]
    q, k, v, *rest = small
    rest = [x if x.dim() == 1 else x[..., :2] if x.dim() == 3 else x[:, :2, :3, :3] for x in rest]
    rest = [x[:2] if x.dim() == 1 else x for x in rest]
    leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v, *rest)]
    torch.autograd.gradcheck(_public("chunk", rule, True), leaves, fast_mode=True)
    torch.autograd.gradcheck(_public("recurrent", rule, True), leaves, fast_mode=True)
    torch.autograd.gradcheck(_dense_reference(rule, 3**-0.5, True), leaves, fast_mode=True)


def test_value_heads_share_key_heads() -> None:
    q, k, v, g, beta = rule_inputs("gated_delta", (1, 40), heads=2, value_heads=4)
    assert g is not None and beta is not None
    o, _ = ops.chunk_gated_delta_rule(q, k, v, g, beta)
    wide, _ = ops.chunk_gated_delta_rule(q.repeat_interleave(2, 2), k.repeat_interleave(2, 2), v, g, beta)
    assert relative(o, wide) < 1e-6


def test_in_place_is_refused_with_gradients() -> None:
    q, k, v, *_ = rule_inputs("linear", (1, 1))
    with pytest.raises(RuntimeError, match="recurrent_linear_attn_ must run without gradients"):
        ops.recurrent_linear_attn_(q, k, v, torch.zeros(1, 4, 16, 8))


def test_messages() -> None:
    q, k, v, g, beta = rule_inputs("gated_delta", (1, 5))
    assert g is not None and beta is not None
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, K\], got shape \(5, 2, 16\)"):
        ops.chunk_gated_delta_rule(q[0], k[0], v[0], g[0], beta[0])
    with pytest.raises(ValueError, match="v must have a multiple of the 2 heads of q, got 3"):
        ops.chunk_gated_delta_rule(q, k, v[:, :, :3], g[..., :3], beta[..., :3])
    with pytest.raises(ValueError, match=r"initial_state must be \[NS, HV, K, V\] = \[1, 4, 16, 8\], got shape"):
        ops.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=torch.zeros(2, 4, 16, 8))
    with pytest.raises(ValueError, match="g must have one of the dtypes float32, float64, got bfloat16"):
        ops.chunk_gated_delta_rule(q, k, v, g.bfloat16(), beta)
    with pytest.raises(ValueError, match="q must have batch size 1 with cu_seqlens, got 2"):
        ops.chunk_linear_attn(q.expand(2, -1, -1, -1), k, v, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.skipif(ON_GPU, reason="the values of tensors on a GPU are not read")
def test_messages_about_values() -> None:
    q, k, v, g, beta = rule_inputs("gated_delta", (1, 5))
    assert g is not None and beta is not None
    with pytest.raises(ValueError, match="state_indices must name different states"):
        ops.recurrent_gated_delta_rule(
            q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), g.expand(2, -1, -1),
            beta.expand(2, -1, -1), initial_state=torch.zeros(3, 4, 16, 8), state_indices=torch.tensor([1, 1]),
        )  # fmt: skip


def test_whole_chunks_stay_in_place() -> None:
    """Sequences of whole chunks are not placed anew; packed ones are, and give the same bits."""
    q, k, v, g, beta = (x.requires_grad_() for x in rule_inputs("gated_delta", (2, 128)) if x is not None)
    state = torch.randn(2, 4, 16, 8)
    leaves = [q, k, v, g, beta]
    actual = ops.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    packed = [x.flatten(0, 1).unsqueeze(0) for x in leaves]
    q, k, v, g, beta = packed
    bounds = torch.tensor([0, 128, 256])
    expected = ops.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, cu_seqlens=bounds)
    assert torch.equal(actual[0].flatten(0, 1), expected[0][0]) and torch.equal(actual[1], expected[1])
    grad = torch.randn_like(actual[0])
    grads = torch.autograd.grad(actual[0], leaves, grad)
    for a, b in zip(grads, torch.autograd.grad(expected[0], leaves, grad.view(expected[0].shape)), strict=True):
        assert torch.equal(a, b)
