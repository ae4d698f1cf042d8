from __future__ import annotations

import pytest
import torch
from support import assert_parity

from mom_compile.ops import route
from mom_compile.ops.route import route_reference


@pytest.mark.parametrize(("tokens", "memories", "topk"), [(0, 4, 2), (1, 1, 1), (200, 4, 2), (63, 8, 8), (65, 5, 1)])
def test_parity(tokens: int, memories: int, topk: int) -> None:
    logits = torch.randn(tokens, memories)
    assert torch.equal(route(logits, topk)[1], route_reference(logits, topk)[1])
    if tokens:
        assert_parity(lambda x: route(x, topk), lambda x: route_reference(x, topk), [logits])


@pytest.mark.parametrize("logits", [torch.zeros(7, 5), torch.randint(-1, 2, (300, 8)).float(), -torch.zeros(3, 4)])
def test_ties_go_to_the_lowest_index(logits: torch.Tensor) -> None:
    for topk in range(1, logits.shape[1] + 1):
        assert torch.equal(route(logits, topk)[1], route_reference(logits, topk)[1])


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, 1e30], [-1e30, -1e30, -1e30, -1e30]], requires_grad=True)
    weights, indices = route(logits, 2)
    assert indices.tolist() == [[0, 3], [0, 1]]
    (grad,) = torch.autograd.grad(weights.square().sum(), logits)
    assert torch.isfinite(weights).all() and torch.isfinite(grad).all()


def test_leading_axes() -> None:
    logits = torch.randn(2, 3, 4)
    weights, indices = route(logits, 2)
    assert weights.shape == indices.shape == (2, 3, 2)
    assert torch.equal(weights.flatten(0, 1), route(logits.flatten(0, 1), 2)[0])


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"topk must lie in \[1, 4\], got 5; select at least one"):
        route(torch.randn(3, 4), 5)
    with pytest.raises(ValueError, match="logits must have one of the dtypes float32, float64, got bfloat16"):
        route(torch.randn(3, 4).bfloat16(), 1)
