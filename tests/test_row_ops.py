"""permute, gate_rows, combine, combine_norm, short_conv, gated_rms_norm and grouped_linear against references."""

from __future__ import annotations

import pytest
import torch
from support import INTERPRET, ON_GPU, assert_close, assert_parity, cover, plan_cases

from mom_compile.ops import combine, combine_norm, gate_rows, gated_rms_norm, grouped_linear, permute, short_conv
from mom_compile.ops.combine import combine_reference
from mom_compile.ops.combine_norm import combine_norm_reference
from mom_compile.ops.gate_rows import gate_rows_reference
from mom_compile.ops.gated_rms_norm import gated_rms_norm_reference
from mom_compile.ops.grouped_linear import grouped_linear_reference
from mom_compile.ops.permute import permute_reference
from mom_compile.ops.short_conv import short_conv_reference, short_conv_rows

CASES = plan_cases()


@pytest.mark.parametrize("name", CASES)
def test_permute(name: str) -> None:
    plan, tokens, _ = CASES[name]()
    assert_parity(
        lambda x: permute(x, plan),
        lambda x: permute_reference(x, plan.slot_of, plan.entry_of),
        [torch.randn(tokens, 11)],
    )


@pytest.mark.parametrize(("features", "dtype"), [(48, torch.bfloat16), (100, torch.float16), (1100, torch.float32)])
def test_permute_and_combine_by_features(features: int, dtype: torch.dtype) -> None:
    plan, tokens, _ = CASES["masked"]()
    assert_parity(
        lambda x: permute(x, plan),
        lambda x: permute_reference(x, plan.slot_of, plan.entry_of),
        [torch.randn(tokens, features).to(dtype)],
    )
    o = torch.randn(plan.entry_of.shape[0], 2, features // 2).to(dtype)
    assert_parity(
        lambda o, w: combine(o, w, plan),
        lambda o, w: combine_reference(o, w, plan.slot_of, plan.entry_of),
        [o, torch.rand(tokens, 2)],
    )


GATES = [(2, 3, False), (1, 1, True), (3, 24, False), (2, 5, True)]


@pytest.mark.parametrize(
    ("name", "gates"),
    cover(CASES, GATES, keep=lambda name, gates: list(CASES).index(name) % len(GATES) == GATES.index(gates)),
)
def test_gate_rows(name: str, gates: tuple[int, int, bool]) -> None:
    parts, heads, one_group = gates
    plan, tokens, _ = CASES[name]()
    groups = 1 if one_group else plan.group_offset.shape[0] - 1
    assert_parity(
        lambda gates: gate_rows(gates, plan),
        lambda gates: gate_rows_reference(gates, plan.slot_of, plan.entry_of, plan.chunk_segment),
        [torch.randn(tokens, groups, parts, heads)],
    )


@pytest.mark.parametrize("name", CASES)
def test_combine(name: str) -> None:
    plan, tokens, _ = CASES[name]()
    shared = plan.group_offset.shape[0] - 1 > 1 and "65" not in name and name not in ("7-tokens", "63-tokens")
    topk = plan.slot_of.shape[1] - int(shared)
    o = torch.randn(plan.entry_of.shape[0], 2, 5)
    assert_parity(
        lambda o, w: combine(o, w, plan),
        lambda o, w: combine_reference(o, w, plan.slot_of, plan.entry_of),
        [o, torch.rand(tokens, topk)],
    )


def _check_combine_norm(name: str, heads: int, features: int, dtype: torch.dtype, scale: float, eps: float) -> None:
    plan, tokens, _ = CASES[name]()
    shared = plan.group_offset.shape[0] - 1 > 1 and "65" not in name and name not in ("7-tokens", "63-tokens")
    o = torch.randn(plan.entry_of.shape[0], heads, features).to(dtype) * scale
    weights = torch.rand(tokens, plan.slot_of.shape[1] - int(shared))
    gate = (torch.randn(tokens, heads, features) * 3).to(dtype)
    assert_parity(
        lambda o, w, gate, n: combine_norm(o, w, plan, gate, n, eps),
        lambda o, w, gate, n: combine_norm_reference(o, w, plan.slot_of, plan.entry_of, gate, n, eps),
        [o, weights, gate, torch.randn(features)],
    )


@pytest.mark.parametrize("name", CASES)
def test_combine_norm(name: str) -> None:
    # Of one choice the norm takes the scale out, but for eps: with a small one nothing but rounding would be compared.
    _check_combine_norm(name, 2, 5, torch.float32, 1.0, eps=0.5)


@pytest.mark.parametrize(
    ("heads", "features", "dtype"),
    [(1, 48, torch.bfloat16), (3, 100, torch.float16), (6, 300, torch.float32), (4, 16, torch.float64)],
)
def test_combine_norm_by_features(heads: int, features: int, dtype: torch.dtype) -> None:
    _check_combine_norm("masked", heads, features, dtype, 1.0, 1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_combine_norm_of_tiny_and_huge_rows(scale: float) -> None:
    _check_combine_norm("documents", 2, 20, torch.float32, scale, 1e-6)


def test_combine_norm_of_nothing() -> None:
    plan, tokens, _ = CASES["masked"]()
    o = torch.zeros(plan.entry_of.shape[0], 2, 8, requires_grad=True)
    gate, weights = torch.randn(tokens, 2, 8), torch.rand(tokens, 2)
    y = combine_norm(o, weights, plan, gate, torch.ones(8))
    (grad,) = torch.autograd.grad(y.sum(), o)
    assert not y.any() and torch.isfinite(grad).all() and not grad[plan.entry_of < 0].any()


CONV_PLANS = ["one-token", "65-tokens", "documents", "masked"]


def _kept(name: str, with_state: bool, activation: str, width: int) -> bool:
    """A quarter, in which each value meets each of the others."""
    first, second = divmod(CONV_PLANS.index(name), 2)
    return (activation == "silu") == (with_state ^ bool(first)) and (width == 4) == (with_state ^ bool(second))


@pytest.mark.parametrize(
    ("name", "with_state", "activation", "width"),
    cover(CONV_PLANS, [True, False], ["silu", "none"], [2, 4], keep=_kept),
)
def test_short_conv(name: str, with_state: bool, activation: str, width: int) -> None:
    plan, tokens, segments = CASES[name]()
    rows = permute(torch.randn(tokens, 6), plan)
    state = [torch.randn(segments, 6, width - 1)] if with_state else []

    def reference(x, weight, state=None):
        return short_conv_reference(x, weight, state, plan.segment_start, plan.segment_length, activation)

    def function(x, weight, state=None):
        return short_conv_rows(x, weight, plan, state, activation)

    assert_parity(function, reference, [rows, torch.randn(6, width), *state])


@pytest.mark.parametrize(
    ("features", "width", "dtype"),
    [(100, 1, torch.float32), (70, 3, torch.float32), (48, 4, torch.bfloat16), (7, 6, torch.float16)],
)
@pytest.mark.parametrize("with_state", [True, False])
def test_short_conv_by_features_and_width(features: int, width: int, dtype: torch.dtype, with_state: bool) -> None:
    plan, tokens, segments = CASES["masked"]()
    rows = permute(torch.randn(tokens, features).to(dtype), plan)
    state = [torch.randn(segments, features, width - 1).to(dtype)] if with_state else []

    def reference(x, weight, state=None):
        return short_conv_reference(x, weight, state, plan.segment_start, plan.segment_length, "silu")

    def function(x, weight, state=None):
        return short_conv_rows(x, weight, plan, state)

    assert_parity(function, reference, [rows, torch.randn(features, width).to(dtype), *state])


def test_short_conv_on_sequences_continues_from_its_state() -> None:
    x, weight = torch.randn(2, 70, 6), torch.randn(6, 4)
    whole, final = short_conv(x, weight)
    first, state = short_conv(x[:, :2], weight)
    second, last = short_conv(x[:, 2:], weight, state)
    assert_close(torch.cat([first, second], 1), whole, 1e-6, "output")
    assert torch.equal(last, final)
    packed, _ = short_conv(x.reshape(1, 140, 6), weight, cu_seqlens=torch.tensor([0, 70, 140]))
    assert torch.equal(packed.view(2, 70, 6), whole)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 8), torch.float32),
        ((3, 5, 2, 20), torch.float32),
        ((130, 60), torch.float32),
        ((70, 100), torch.bfloat16),
        ((5, 300), torch.float16),
        ((0, 16), torch.float32),
    ],
)
def test_gated_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The weight keeps float32, as under autocast.
    inputs = [torch.randn(shape).to(dtype), (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1])]
    assert_parity(
        lambda x, g, w: gated_rms_norm(x, g, w, 1e-6),
        lambda x, g, w: gated_rms_norm_reference(x, g, w, 1e-6),
        inputs,
    )


def test_gated_rms_norm_of_zero_rows() -> None:
    x, gate, weight = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8), torch.ones(8)
    y = gated_rms_norm(x, gate, weight)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", ["one-token", "200-tokens", "documents", "all-to-one-memory"])
def test_grouped_linear(name: str) -> None:
    plan, tokens, _ = CASES[name]()
    groups = plan.group_offset.shape[0] - 1
    rows = permute(torch.randn(tokens, 24), plan)
    assert_parity(
        lambda x, w: grouped_linear(x, w, plan.group_offset),
        lambda x, w: grouped_linear_reference(x, w, plan.group_offset),
        [rows, torch.randn(groups, 19, 24)],
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("bounds", "rows", "columns", "inner", "dtype"),
    [
        ([0, 5, 5, 70, 71, 150], 150, 33, 100, torch.float32),  # bounds inside tiles, several in one
        ([0, 64, 192], 256, 130, 17, torch.float32),
        ([0, 10, 20], 90, 40, 70, torch.bfloat16),
        ([0, 0, 0], 64, 16, 16, torch.float16),
        ([0, 0], 0, 8, 8, torch.float32),
    ],
)
def test_grouped_linear_of_any_bounds(
    bounds: list[int], rows: int, columns: int, inner: int, dtype: torch.dtype, transposed: bool
) -> None:
    offset = torch.tensor(bounds, dtype=torch.int32)
    shape = (len(bounds) - 1, inner, columns) if transposed else (len(bounds) - 1, columns, inner)

    def weight(w: torch.Tensor) -> torch.Tensor:
        return w.transpose(1, 2) if transposed else w

    assert_parity(
        lambda x, w: grouped_linear(x, weight(w), offset),
        lambda x, w: grouped_linear_reference(x, weight(w), offset),
        [torch.randn(rows, inner).to(dtype), torch.randn(shape).to(dtype)],
    )


@pytest.mark.skipif(not (INTERPRET or ON_GPU), reason="of a kernel")
def test_ends_of_groups_rise_within_the_rows() -> None:
    from mom_compile.ops.grouped_linear.launch import _ends

    bounds = [7, -3, 64, 20, 1 << 30, 128, 300]
    assert _ends(torch.tensor(bounds, dtype=torch.int32), 256).tolist() == [0, 64, 64, 256, 256, 256]
    assert _ends(torch.tensor([0, 64, 128], dtype=torch.int32), 128).tolist() == [64, 128]


def test_messages() -> None:
    plan, tokens, _ = CASES["200-tokens"]()
    with pytest.raises(ValueError, match=r"slot_of must be \[T, k'\] = \[3, any\], got shape \(200, 3\)"):
        permute(torch.randn(3, 4), plan)
    with pytest.raises(ValueError, match="activation must be one of silu, none, got 'relu'"):
        short_conv(torch.randn(1, 3, 4), torch.randn(4, 2), activation="relu")
    with pytest.raises(ValueError, match=r"weight must be \[F, W\] = \[4, any\], got shape \(5, 2\)"):
        short_conv(torch.randn(1, 3, 4), torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"gate must be \[..., V\] = \[2, 4\], got shape \(2, 5\)"):
        gated_rms_norm(torch.randn(2, 4), torch.randn(2, 5), torch.ones(4))
    with pytest.raises(ValueError, match="slot_of must have k or k \\+ 1 columns for weights of k = 1, got 3"):
        combine(torch.randn(plan.entry_of.shape[0], 1, 2), torch.rand(tokens, 1), plan)
    with pytest.raises(ValueError, match=r"gates must be \[T, G, n, HV\], got shape \(200, 5, 2\)"):
        gate_rows(torch.randn(tokens, 5, 2), plan)
    with pytest.raises(ValueError, match="gates must have one of the dtypes float32, float64, got bfloat16"):
        gate_rows(torch.randn(tokens, 5, 2, 3).bfloat16(), plan)
    o, weights = torch.randn(plan.entry_of.shape[0], 1, 2), torch.rand(tokens, 2)
    with pytest.raises(ValueError, match=r"gate must be \[T, HV, V\] = \[200, 1, 2\], got shape \(200, 2\)"):
        combine_norm(o, weights, plan, torch.randn(tokens, 2), torch.ones(2))
    with pytest.raises(ValueError, match="gate must have one of the dtypes float32, got bfloat16"):
        combine_norm(o, weights, plan, torch.randn(tokens, 1, 2).bfloat16(), torch.ones(2))


@pytest.mark.skipif(ON_GPU, reason="the values of tensors on a GPU are not read")
def test_messages_about_values() -> None:
    with pytest.raises(ValueError, match="group_offset must rise from 0"):
        grouped_linear(torch.randn(64, 4), torch.randn(1, 2, 4), torch.tensor([0, 128], dtype=torch.int32))
