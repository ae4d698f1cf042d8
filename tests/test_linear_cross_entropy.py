"""Cross entropy under a linear projection: parity, chunks, ignored rows, autocast, compile."""

from __future__ import annotations

import pytest
import torch
from support import INTERPRET, TOLERANCES, assert_close, assert_parity
from torch import Tensor
from torch.nn import functional as F

from mom_compile.ops import linear_cross_entropy
from mom_compile.ops.linear_cross_entropy import cpu, linear_cross_entropy_reference

IGNORE = -100


def _inputs(tokens: int, vocabulary: int, dim: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, weight = torch.randn(tokens, dim, dtype=dtype), torch.randn(vocabulary, dim, dtype=dtype)
    target = torch.randint(0, vocabulary, (tokens,))
    target[::3] = IGNORE
    return x, weight, target


@pytest.fixture(params=[1, 7, 1000])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of logits that are made at once, for a vocabulary of 50."""
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 50 * request.param)
    if INTERPRET or torch.get_default_device().type == "cuda":
        from mom_compile.ops.linear_cross_entropy import launch

        monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 50 * request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_parity(tokens: int, dtype: torch.dtype, chunk_rows: int) -> None:
    x, weight, target = _inputs(tokens, 50, dtype=dtype)
    assert_parity(
        lambda x, weight: linear_cross_entropy(x, weight, target, reduction="sum"),
        lambda x, weight: linear_cross_entropy_reference(x, weight, target, IGNORE),
        [x, weight],
        TOLERANCES[dtype],
    )


def test_as_the_plain_one_in_float64(chunk_rows: int) -> None:
    x, weight, target = _inputs(20, 50, dtype=torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    fused = linear_cross_entropy(x.view(4, 5, 12), weight, target.view(4, 5))
    plain = F.cross_entropy(x @ weight.t(), target, ignore_index=IGNORE)
    assert_close(fused, plain, 1e-12, "loss")
    for name, a, b in zip(
        ("x", "weight"),
        torch.autograd.grad(3 * fused, (x, weight)),
        torch.autograd.grad(3 * plain, (x, weight)),
        strict=True,
    ):
        assert_close(a, b, 1e-12, name)


def test_a_vocabulary_of_several_blocks() -> None:
    x, weight, target = _inputs(3, 4097, 4)
    assert_parity(
        lambda x, weight: linear_cross_entropy(x, weight, target, reduction="sum"),
        lambda x, weight: linear_cross_entropy_reference(x, weight, target, IGNORE),
        [x, weight],
    )


def test_every_row_ignored_gives_zero() -> None:
    x, weight, _ = _inputs(5, 50)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), torch.full((5,), IGNORE))
    loss.backward()
    assert x.grad is not None and weight.grad is not None
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_large_logits_stay_finite() -> None:
    x = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = linear_cross_entropy(x, torch.eye(2), torch.tensor([0, 0]), reduction="sum")
    loss.backward()
    assert loss == 2e4 and x.grad is not None and torch.isfinite(x.grad).all()


def test_no_gradients_are_made_where_none_are_wanted() -> None:
    x, weight, target = _inputs(20, 50)
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), weight, target)
    assert_close(loss, linear_cross_entropy(x, weight, target).detach(), 1e-6, "loss")
    *_, dx, dweight = torch.ops.mom.linear_cross_entropy(x.detach(), weight, target, IGNORE, False)
    assert dx.shape == dweight.shape == (0,)


def test_under_autocast() -> None:
    x, weight, target = _inputs(20, 50)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    assert x.grad is not None and weight.grad is not None
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert_close(loss, F.cross_entropy(x @ weight.t(), target).detach(), TOLERANCES[torch.bfloat16], "loss")


@pytest.mark.skipif(INTERPRET, reason="nothing about kernels")
def test_one_graph_for_every_length() -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 20, 33):
        x, weight, target = _inputs(tokens, 50)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=tokens > 7):
            actual = torch.autograd.grad(compiled(x, weight, target), (x, weight))
        expected = torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_messages() -> None:
    x, weight, target = _inputs(4, 50)
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, got 'none'; choose one of them"):
        linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(ValueError, match=r"weight must be \[V, D\] = \[any, 12\], got shape \(50, 11\)"):
        linear_cross_entropy(x, weight[:, 1:], target)
    with pytest.raises(ValueError, match=r"target must have one of the dtypes int64, got int32"):
        linear_cross_entropy(x, weight, target.int())
    if x.device.type == "cpu":
        with pytest.raises(ValueError, match=r"target must lie in \[0, 50\) or be -100, got 50; the text was"):
            linear_cross_entropy(x, weight, torch.tensor([0, 50, 1, 2]))
    with pytest.raises(ValueError, match="grads must be True where the loss is differentiated, got False"):
        torch.ops.mom.linear_cross_entropy(x.requires_grad_(), weight, target, IGNORE, False)[0].backward()
