"""conv_qkv against its float64 reference and against the operators that it joins."""

from __future__ import annotations

import pytest
import torch
from support import assert_close, assert_parity, plan_cases
from torch import Tensor

from mom_compile.ops import conv_qkv, l2_norm, permute
from mom_compile.ops.conv_qkv import conv_qkv_reference
from mom_compile.ops.short_conv import short_conv_rows

CASES = plan_cases()


@pytest.mark.parametrize(
    ("name", "heads", "dim", "values", "width", "with_state", "dtype"),
    [
        ("one-token", 2, 4, 6, 4, True, torch.float32),
        ("65-tokens", 2, 4, 6, 4, False, torch.float32),
        ("documents", 2, 4, 6, 4, True, torch.float32),
        ("masked", 1, 20, 33, 2, False, torch.float32),
        ("all-to-one-memory", 2, 16, 32, 3, True, torch.bfloat16),
        ("65-tokens", 1, 8, 8, 1, False, torch.float32),
        ("65-tokens", 1, 8, 8, 6, True, torch.float16),
    ],
)
def test_conv_qkv(
    name: str, heads: int, dim: int, values: int, width: int, with_state: bool, dtype: torch.dtype
) -> None:
    plan, tokens, segments = CASES[name]()
    size = heads * dim
    real = (plan.entry_of >= 0).unsqueeze(1)
    kv = (torch.randn(plan.entry_of.shape[0], size + values) * real).to(dtype)
    channels = 2 * size + values
    state = [torch.randn(segments, channels, width - 1).to(dtype)] if with_state else []

    def function(q: Tensor, kv: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, ...]:
        return conv_qkv(q, kv, weight, plan, dim, state)

    def reference(q: Tensor, kv: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, ...]:
        tables = plan.slot_of, plan.entry_of, plan.segment_start, plan.segment_length
        return conv_qkv_reference(q, kv, weight, state, *tables, dim)

    inputs = [torch.randn(tokens, size).to(dtype), kv, torch.randn(channels, width).to(dtype), *state]
    assert_parity(function, reference, inputs)


def test_conv_qkv_is_the_operators_that_it_joins() -> None:
    plan, tokens, segments = CASES["documents"]()
    q, kv = torch.randn(tokens, 16), torch.randn(plan.entry_of.shape[0], 28) * (plan.entry_of >= 0).unsqueeze(1)
    weight, state = torch.randn(44, 4), torch.randn(segments, 44, 3)
    rows, final = short_conv_rows(torch.cat([permute(q, plan), kv], 1), weight, plan, state)
    heads = l2_norm(rows[:, :32].unflatten(1, (2, 2, 8)))
    actual = conv_qkv(q, kv, weight, plan, 8, state)
    for a, b, what in zip(actual, (heads[:, 0], heads[:, 1], rows[:, 32:], final), "qkvs", strict=True):
        assert_close(a, b, 1e-6, what)


def test_messages() -> None:
    plan, tokens, _ = CASES["200-tokens"]()
    q, kv = torch.randn(tokens, 16), torch.randn(plan.entry_of.shape[0], 28)
    with pytest.raises(ValueError, match="head_dim must divide the 16 columns of q, got 5; pass K"):
        conv_qkv(q, kv, torch.randn(44, 4), plan, 5)
    with pytest.raises(ValueError, match=r"kv must be at least 16, got 12; it must hold the columns of k"):
        conv_qkv(q, kv[:, :12], torch.randn(28, 4), plan, 8)
    with pytest.raises(ValueError, match=r"weight must be \[2\*H\*K \+ HV\*V, W\] = \[44, any\], got shape \(40, 4\)"):
        conv_qkv(q, kv, torch.randn(40, 4), plan, 8)
    with pytest.raises(ValueError, match="kv must have one of the dtypes float32, got bfloat16"):
        conv_qkv(q, kv.bfloat16(), torch.randn(44, 4), plan, 8)
