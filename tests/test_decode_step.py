"""The decode step against its reference: functional, in place, interpreted; nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import INTERPRET, ON_GPU, TOLERANCES, assert_close, cover
from torch import Tensor

from mom_compile.ops import RULES
from mom_compile.ops.decode_step import decode_step, decode_step_, decode_step_reference

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "odd-heads": {"K": 20, "V": 36, "H": 1, "HV": 3},
    "grouped": {"H": 2, "HV": 4, "K": 16, "V": 8, "batch": 1, "tokens": 1},
    "single-kv": {"single": True, "width": 0},
    "no-shared": {"shared": False, "topk": 3, "M": 3, "width": 2},
    "one-memory": {"M": 1, "topk": 1, "width": 3},
    "wide": {"K": 64, "V": 128, "H": 1, "HV": 1, "batch": 2, "tokens": 1},
}
NAMES = (
    "router_logits router_indices router_weights a b A_log dt_bias conv_weight recurrent_state conv_state valid rule "
    "topk shared scale norm_weight gate eps"
).split()


def make(
    rule: str = "gated_delta",
    dtype: torch.dtype = torch.float32,
    state: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    tokens: int = 1 if INTERPRET else 3,
    H: int = 2,
    HV: int = 2,
    K: int = 8,
    V: int = 8,
    M: int = 4,
    topk: int = 2,
    shared: bool = True,
    single: bool = False,
    width: int = 4,
    routing: str = "own",
    valid: bool = False,
    norm: bool = False,
    gate: bool = False,
) -> dict[str, Any]:
    total = M + shared
    groups = 1 if single else total
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = 2 * H * K + HV * V
    kind = RULES[rule]
    inputs: dict[str, Any] = dict.fromkeys(NAMES)
    inputs |= {
        "q": torch.randn(batch, tokens, H * K).to(dtype),
        "kv": torch.randn(batch, tokens, groups, H * K + HV * V).to(dtype),
        "recurrent_state": torch.randn(batch, total, HV, K, V).to(torch.float64 if dtype == torch.float64 else state),
        "rule": rule,
        "topk": topk,
        "shared": shared,
        "scale": 0.5,
        "eps": 1e-6,
    }
    if norm:
        inputs["norm_weight"] = torch.rand(V).to(dtype)
    if gate:
        inputs["gate"] = torch.randn(batch, tokens, HV * V + 5).to(dtype)[..., : HV * V]
    if routing != "custom":
        inputs["router_logits"] = torch.randn(batch, tokens, M, dtype=wide)
    if routing != "own":
        inputs["router_indices"] = torch.rand(batch, tokens, M).argsort(-1)[..., :topk]
    if routing == "custom":
        inputs["router_weights"] = torch.rand(batch, tokens, topk, dtype=wide)
    if kind.gate == "scalar":
        inputs["a"] = torch.randn(batch, tokens, groups, HV, dtype=wide)
        inputs["A_log"] = torch.rand(HV).to(dtype)
        inputs["dt_bias"] = (torch.randn(HV) - 4).to(dtype)
    if kind.delta:
        inputs["b"] = torch.randn(batch, tokens, groups, HV, dtype=wide)
    if width:
        inputs["conv_weight"] = torch.randn(channels, width).to(dtype)
        inputs["conv_state"] = torch.randn(batch, total, channels, width - 1).to(dtype)
    if valid:
        inputs["valid"] = torch.rand(batch, tokens) > 0.4
    return inputs


def clone(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def check(inputs: dict[str, Any], tolerance: float | None = None) -> None:
    """Both forms against the reference; the functional one leaves its inputs, the other what it did not select."""
    before = clone(inputs)
    tolerance = TOLERANCES[inputs["q"].dtype] if tolerance is None else tolerance
    expected, expected_state, expected_window = decode_step_reference(**inputs)
    o, state, window = decode_step(**inputs)
    for name, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(inputs[name], value), name
    own = clone(inputs)
    same = decode_step_(**own)
    assert torch.equal(same, o)
    assert torch.equal(own["recurrent_state"], state)
    assert_close(o, expected, tolerance, "o")
    state_tolerance = max(tolerance, TOLERANCES[state.dtype])
    assert_close(state, expected_state, state_tolerance, "recurrent_state")
    touched = (expected_state != before["recurrent_state"].double()).flatten(2).any(2)
    assert torch.equal(state[~touched], before["recurrent_state"][~touched])
    if window is None:
        assert expected_window is None
        return
    assert expected_window is not None and torch.equal(own["conv_state"], window)
    assert torch.equal(window.double(), expected_window)


@pytest.mark.parametrize(
    ("rule", "shape"),
    cover(RULES, SHAPES, keep=lambda rule, shape: rule == "gated_delta" or shape in ("grouped", "single-kv")),
)
def test_against_the_reference(rule: str, shape: str) -> None:
    check(make(rule, **SHAPES[shape]))


@pytest.mark.parametrize("routing", ["own", "given", "custom"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_routings_and_masks(dtype: torch.dtype, routing: str) -> None:
    check(make(dtype=dtype, routing=routing, valid=True))


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_state(rule: str) -> None:
    # The reference keeps the state exact between tokens, so one token.
    check(make(rule, torch.bfloat16, torch.bfloat16, tokens=1))


@pytest.mark.parametrize(
    ("gate", "shape"), cover([False, True], SHAPES, keep=lambda gate, shape: gate or shape == "default")
)
def test_norm_and_gate(gate: bool, shape: str) -> None:
    check(make(norm=True, gate=gate, **SHAPES[shape]))


def test_ties_take_the_lowest_index() -> None:
    inputs = make(tokens=1)
    inputs["router_logits"] = torch.zeros(3, 1, 4)
    check(inputs)
    _, state, _ = decode_step(**inputs)
    changed = (state != inputs["recurrent_state"]).flatten(2).any(2)
    assert changed.tolist() == [[True, True, False, False, True]] * 3


@pytest.mark.parametrize("custom", [False, True])
def test_indices_that_select_nothing(custom: bool) -> None:
    """Out of range or repeated: neither reads nor writes, whatever lies there."""
    inputs = make(routing="custom" if custom else "given", tokens=4, batch=2)
    inputs["router_indices"] = torch.tensor([[[0, 0], [-1, 2], [4, 1], [2**40, -(2**40)]]] * 2)
    inputs["recurrent_state"][:, 3] = torch.nan
    before = clone(inputs)
    expected, expected_state, _ = decode_step_reference(**inputs)
    o, state, _ = decode_step(**inputs)
    assert_close(o, expected, 5e-6, "o")
    assert_close(state[:, [0, 1, 2, 4]], expected_state[:, [0, 1, 2, 4]], 5e-6, "state")
    assert torch.equal(state[:, 3].isnan(), before["recurrent_state"][:, 3].isnan())


def test_skipped_tokens_hide_hostile_values() -> None:
    inputs = make(tokens=2, batch=2)
    inputs["valid"] = torch.tensor([[True, False], [False, False]])
    for name in ("q", "kv", "a", "b", "router_logits"):
        inputs[name][~inputs["valid"]] = torch.nan
    o, state, window = decode_step(**inputs)
    assert window is not None
    assert torch.isfinite(o).all() and torch.isfinite(state).all() and torch.isfinite(window).all()
    assert not o[~inputs["valid"]].any()
    assert torch.equal(state[1], inputs["recurrent_state"][1]) and torch.equal(window[1], inputs["conv_state"][1])


def test_extreme_gates() -> None:
    inputs = make(tokens=2)
    for name in ("a", "b"):
        inputs[name] = torch.where(torch.rand_like(inputs[name]) > 0.5, 200.0, -200.0)
    check(inputs)
    inputs["q"].zero_()
    inputs["kv"].zero_()
    check(inputs)


def test_a_batch_of_none_and_no_tokens() -> None:
    for inputs in (make(batch=0), make(tokens=0)):
        o, state, _ = decode_step(**inputs)
        assert o.shape == (*inputs["q"].shape[:2], 2, 8) and torch.equal(state, inputs["recurrent_state"])


def test_columns_of_one_product() -> None:
    """q, kv and the gates may be slices of wider rows."""
    inputs = make(tokens=1)
    wide = torch.cat([inputs["q"].flatten(1), inputs["kv"].flatten(1), torch.randn(3, 5)], 1)
    views = clone(inputs)
    views["q"] = wide[:, :16].unsqueeze(1)
    views["kv"] = wide[:, 16:-5].unflatten(1, (1, 5, -1))
    small = torch.cat([inputs[name].flatten(1) for name in ("router_logits", "a", "b")], 1)
    views["router_logits"] = small[:, :4].unsqueeze(1)
    views["a"], views["b"] = (part.unflatten(1, (1, 5, 2)) for part in small[:, 4:].chunk(2, 1))
    for actual, expected in zip(decode_step(**views), decode_step(**inputs), strict=True):
        assert actual is not None and expected is not None and torch.equal(actual, expected)


def test_repeats_are_bit_equal() -> None:
    inputs = make(dtype=torch.bfloat16, batch=5)
    first = decode_step(**inputs)
    for _ in range(50 if ON_GPU else 3):
        assert all(torch.equal(a, b) for a, b in zip(decode_step(**inputs), first, strict=True))  # type: ignore[arg-type]


def test_in_place_refuses_gradients() -> None:
    inputs = make()
    inputs["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="decode_step_"):
        decode_step_(**inputs).sum().backward()


def test_messages() -> None:
    good = make(tokens=3)

    def bad(**changes: Any) -> dict[str, Any]:
        return {**clone(good), **changes}

    cases = [
        (bad(rule="gla"), "rule must be one of linear, .* got 'gla'"),
        (bad(q=torch.zeros(3, 3, 15)), "q must be .* got shape"),
        (bad(q=torch.zeros(3, 9, 16)), r"q.shape\[1\] must lie in \[0, 8\], got 9"),
        (bad(kv=torch.zeros(3, 3, 2, 32)), r"kv must be .* got shape \(3, 3, 2, 32\)"),
        (bad(kv=good["kv"].bfloat16()), "kv must have one of the dtypes float32, got bfloat16"),
        (bad(topk=5), r"topk must lie in \[1, 4\], got 5"),
        (bad(a=None), "a must be given with rule gated_delta, got None"),
        (bad(rule="linear", a=None, b=None), "A_log must be None with rule linear, got a tensor"),
        (bad(conv_weight=None), "conv_weight must be given with conv_state given, got None"),
        (bad(conv_state=None), "conv_weight must be None with conv_state None, got a tensor"),
        (bad(router_logits=None), "router_weights must be given with router_logits None, got None"),
        (
            bad(router_logits=None, router_weights=torch.zeros(3, 3, 2)),
            "router_indices must be given with router_weights, got None",
        ),
        (bad(router_indices=torch.zeros(3, 3, 2)), "router_indices must have one of the dtypes int64, got float32"),
        (bad(valid=torch.ones(3, 3)), "valid must have one of the dtypes bool, got float32"),
        (bad(norm_weight=torch.ones(9)), r"norm_weight must be .* got shape \(9,\)"),
        (bad(gate=torch.zeros(3, 3, 16)), "norm_weight must be given with gate, got None"),
        (bad(norm_weight=torch.ones(8), gate=torch.zeros(3, 16)), r"gate must be .* got shape \(3, 16\)"),
        (bad(conv_state=torch.zeros(3, 5, 48, 2)), r"conv_state must be .* got shape \(3, 5, 48, 2\)"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            decode_step(**inputs)
    strided = bad(recurrent_state=good["recurrent_state"].transpose(3, 4))
    with pytest.raises(ValueError, match="recurrent_state must be contiguous to be updated in place"):
        decode_step_(**strided)
