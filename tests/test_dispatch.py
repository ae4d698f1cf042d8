from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ON_GPU, random_indices

from mom_compile.ops import dispatch
from mom_compile.ops.dispatch import cpu, dispatch_reference, rows_bound


def _assert_same(indices: torch.Tensor, bounds: list[int], memories: int, valid: torch.Tensor | None, shared: bool):
    cu_seqlens = torch.tensor(bounds)
    plan = dispatch(indices, cu_seqlens, memories, valid, shared)
    expected = dispatch_reference(indices, cu_seqlens, valid, memories, shared)
    for name, actual, want in zip(plan._fields, plan, expected, strict=True):
        if name == "segment_start":  # where an empty segment would start is free
            used = plan.segment_length > 0
            actual, want = actual[used], want[used]
        assert torch.equal(actual, want), name
    assert ((plan.segment_start % 64) == 0).all() and (plan.segment_start <= plan.entry_of.shape[0]).all()


@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5),
    memories=st.integers(1, 6),
    topk=st.integers(0, 6),
    shared=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_equals_reference(lengths: list[int], memories: int, topk: int, shared: bool, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    topk = min(topk, memories)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    indices = random_indices(bounds[-1], memories, topk)
    valid = torch.rand(bounds[-1]) > 0.3 if masked else None
    _assert_same(indices, bounds, memories, valid, shared)


@pytest.mark.parametrize(
    ("bounds", "memories", "topk", "shared"),
    [
        (list(range(0, 601, 2)), 3, 1, True),  # many sequences
        ([0, 0, 300, 300, 520], 40, 5, True),  # many memories
        ([0, 2100], 2, 2, False),
        ([0, 0, 0], 4, 2, True),
        ([0], 4, 2, True),
        ([0, 0], 0, 0, False),
    ],
)
@pytest.mark.parametrize("chunk_size", [64, 16])
def test_every_entry_equals_that_of_pytorch(
    bounds: list[int], memories: int, topk: int, shared: bool, chunk_size: int
) -> None:
    indices, cu_seqlens = random_indices(bounds[-1], memories, topk), torch.tensor(bounds)
    valid = torch.rand(bounds[-1]) > 0.1
    actual = torch.ops.mom.dispatch(indices, cu_seqlens, valid, memories, shared, chunk_size)
    expected = cpu.dispatch(indices, cu_seqlens, valid, memories, shared, chunk_size)
    for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), position


def test_static_size_is_enough_in_the_worst_case() -> None:
    # One token in each of many segments wastes the most rows.
    indices = torch.arange(8).unsqueeze(1)
    plan = dispatch(indices, torch.tensor([0, 8]), 8, None, True)
    assert plan.entry_of.shape[0] == rows_bound(8, 1, 1, 8, True)
    assert (plan.slot_of >= 0).all()


@pytest.mark.skipif(ON_GPU, reason="the values of tensors on a GPU are not read")
def test_messages_about_values() -> None:
    indices = random_indices(5, 3, 2)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens \(5\), got \[0, 4\]"):
        dispatch(indices, torch.tensor([0, 4]), 3)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise .* got \[0, 4, 3, 5\]"):
        dispatch(indices, torch.tensor([0, 4, 3, 5]), 3)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 2\), got"):
        dispatch(torch.full((5, 1), 2), torch.tensor([0, 5]), 2)
    with pytest.raises(ValueError, match="indices must name different memories"):
        dispatch(torch.zeros(5, 2, dtype=torch.int64), torch.tensor([0, 5]), 3)


def test_messages() -> None:
    indices = random_indices(5, 3, 2)
    with pytest.raises(ValueError, match=r"valid must be \[T\] = \[5\], got shape \(4,\)"):
        dispatch(indices, torch.tensor([0, 5]), 3, torch.ones(4, dtype=torch.bool))
