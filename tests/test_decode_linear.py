from __future__ import annotations

from typing import Any

import pytest
import torch
from support import INTERPRET, ON_GPU, TOLERANCES, assert_close, cover
from torch import Tensor

from mom_compile.ops._launch import Launch, instead_of_launches
from mom_compile.ops.decode_linear import decode_linear, decode_linear_, decode_linear_reference


def make(
    rows: int, features: int, outputs: int, dtype: torch.dtype, norm: str = "weight", swiglu: bool = False
) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": torch.randn(rows, features).to(dtype),
        "weight": torch.randn(outputs, features).to(dtype),
        "norm_weight": torch.rand(features).to(dtype) if norm == "weight" else None,
        "small_weight": torch.randn(5, features, dtype=wide),
        "norm": norm != "none",
        "swiglu": swiglu,
        "eps": 1e-6,
    }


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, NORMS = [0, 1, 3, 5, 17, 33], ["none", "plain", "weight"]


def _kept(swiglu: bool, norm: str, rows: int, dtype: torch.dtype) -> bool:
    """A quarter, in which each value meets each of the others."""
    return (swiglu + NORMS.index(norm) + ROWS.index(rows) + DTYPES.index(dtype)) % len(DTYPES) == 0


@pytest.mark.parametrize(("swiglu", "norm", "rows", "dtype"), cover([False, True], NORMS, ROWS, DTYPES, keep=_kept))
def test_against_the_reference(swiglu: bool, norm: str, rows: int, dtype: torch.dtype) -> None:
    for features, outputs in ((64, 50), (48, 20)):
        inputs = make(rows, features, outputs, dtype, norm, swiglu)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        for small_weight in (inputs["small_weight"], None):
            expected, expected_small = decode_linear_reference(**{**inputs, "small_weight": small_weight})
            y, small = decode_linear(**{**inputs, "small_weight": small_weight})
            assert_close(y, expected, TOLERANCES[dtype], "y")
            assert (small is None) == (expected_small is None)
            if small is not None and expected_small is not None:
                assert_close(small, expected_small, TOLERANCES[dtype], "small")
        if norm == "none" and not swiglu:
            residual = torch.randn_like(y)
            expected = expected + residual.double()
            decode_linear_(residual, inputs["x"], inputs["weight"])
            assert_close(residual, expected, TOLERANCES[dtype], "residual")
        for name, value in before.items():
            assert torch.equal(inputs[name], value)


def test_the_small_product_does_not_depend_on_the_batch() -> None:
    inputs = make(40, 64, 32, torch.bfloat16, "plain")
    _, whole = decode_linear(**inputs)
    if not whole.is_cuda:  # type: ignore[union-attr]
        pytest.skip("a property of the kernels")
    for rows in (1, 5):
        _, part = decode_linear(**{**inputs, "x": inputs["x"][:rows]})
        assert torch.equal(part, whole[:rows])  # type: ignore[arg-type,index]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_at_the_ends_of_float16(dtype: torch.dtype) -> None:
    """The squares behind the norm leave the range of float16; a row that is not finite stays alone."""
    inputs = make(4, 64, 50, dtype, "plain")
    inputs["x"][1] *= 6e4 / inputs["x"][1].abs().max()
    inputs["x"][2] *= 1e-3
    expected, expected_small = decode_linear_reference(**inputs)
    y, small = decode_linear(**inputs)
    for row in range(4):
        assert_close(y[row], expected[row], TOLERANCES[dtype], f"row {row}")
        assert_close(small[row], expected_small[row], TOLERANCES[dtype], f"small, row {row}")  # type: ignore[index]
    inputs["x"][3] = torch.inf
    spoiled, spoiled_small = decode_linear(**inputs)
    assert torch.equal(spoiled[:3], y[:3])
    assert torch.equal(spoiled_small[:3], small[:3])  # type: ignore[index]


@pytest.mark.skipif(ON_GPU or not INTERPRET, reason="looks at launches, which need no GPU")
def test_launches_that_overlap() -> None:
    """Those of few programs; not one with the small product, and not one that fills the multiprocessors."""
    for outputs, small, programs, overlap in [(1024, None, 64, True), (12288, 44, 384 + 5 * 11, False)]:
        found: list[Launch] = []
        with instead_of_launches(found.append, 90):
            x, weight = torch.empty(5, 1024, dtype=torch.bfloat16), torch.empty(outputs, 1024, dtype=torch.bfloat16)
            decode_linear(x, weight, norm=True, small_weight=None if small is None else torch.empty(small, 1024))
        assert [(call.grid, call.config.overlap) for call in found] == [((programs,), overlap)]


def test_messages() -> None:
    good = make(2, 64, 8, torch.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.zeros(2, 63)}, r"x must be .* got shape \(2, 63\)"),
        ({"weight": good["weight"].bfloat16()}, "weight must have one of the dtypes float32, got bfloat16"),
        ({"weight": good["weight"][:7], "swiglu": True}, "weight must have an even number of rows with swiglu, got 7"),
        ({"norm": False}, "norm_weight must be None without norm, got a tensor"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight must be .* got shape \(7,\)"),
        ({"norm_weight": torch.ones(64).double()}, "norm_weight must have .* got float64"),
        ({"small_weight": torch.zeros(2, 64, dtype=torch.float64)}, "small_weight must have .* got float64"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            decode_linear(**{**good, **changes})
    for residual, message in [
        (torch.zeros(2, 9), r"residual must be .* got shape \(2, 9\)"),
        (torch.zeros(2, 8, dtype=torch.float64), "residual must have .* got float64"),
        (torch.zeros(8, 2).t(), "residual must be contiguous to be updated in place"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_linear_(residual, good["x"], good["weight"])
