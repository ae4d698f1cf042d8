"""small_linear against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from support import TOLERANCES, assert_close, assert_parity

from mom_compile.ops import small_linear
from mom_compile.ops.small_linear import small_linear_reference

SHAPES = [(1, 3, 8), (33, 44, 100), (200, 70, 48), (0, 4, 8), (5, 0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "outputs", "inner"), SHAPES)
def test_outputs_and_gradients(tokens: int, outputs: int, inner: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(tokens, inner).to(dtype), torch.randn(outputs, inner).to(dtype)]
    assert_parity(small_linear, small_linear_reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_as_exact_as_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(130, 300).to(dtype), torch.randn(21, 300).to(dtype)
    assert_close(small_linear(x, weight), small_linear_reference(x, weight), TOLERANCES[torch.float32], "output")


def test_the_gradient_is_rounded_once() -> None:
    # 1 + 2^-12 is no bfloat16 number; the difference of two products shows what its rounding would lose.
    x, weight = torch.zeros(40, 16, dtype=torch.bfloat16), torch.zeros(2, 16, dtype=torch.bfloat16)
    weight[0], weight[1] = 4096, -4096
    x.requires_grad_()
    dy = torch.tensor([1 + 2**-12, 1.0]).expand(40, 2)
    (dx,) = torch.autograd.grad(small_linear(x, weight), x, dy)
    assert torch.equal(dx, torch.ones_like(dx))


def test_large_and_small_gradients() -> None:
    x, weight = torch.randn(70, 20).bfloat16(), torch.randn(6, 20).bfloat16()
    dy = torch.randn(70, 6) * 10.0 ** torch.randint(-12, 12, (70, 1))
    dx, dweight = torch.ops.mom.small_linear_bwd(dy, x, weight)
    rows = dy.double() @ weight.double()
    assert (((dx.double() - rows).norm(dim=1) / rows.norm(dim=1)) < TOLERANCES[torch.bfloat16]).all()
    assert_close(dweight, dy.double().t() @ x.double(), TOLERANCES[torch.bfloat16], "gradient of the weight")


def test_leading_axes_and_strides() -> None:
    x, weight = torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8, 5).t()
    assert_close(small_linear(x, weight), x.double() @ weight.double().t(), TOLERANCES[torch.float32], "output")


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[n, D\] = \[any, 8\], got shape \(3, 7\)"):
        small_linear(torch.randn(2, 8), torch.randn(3, 7))
    with pytest.raises(ValueError, match="weight must have one of the dtypes float32, got bfloat16"):
        small_linear(torch.randn(2, 8), torch.randn(3, 8).bfloat16())
