from __future__ import annotations

from typing import Any

import pytest
import torch
from support import TOLERANCES, assert_close
from torch import Tensor

from mom_compile.ops.decode_linear import INPUTS, decode_linear, decode_linear_, decode_linear_reference


def make(input: str, rows: int, features: int, outputs: int, dtype: torch.dtype, head: int = 16) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = {"rms_norm": features, "gated_rms_norm": head}.get(input)
    apart = torch.randn(rows, features + 3).to(dtype)[:, :features]
    return {
        "x": torch.randn(rows, features * (1 + (input == "swiglu"))).to(dtype),
        "weight": torch.randn(outputs, features).to(dtype),
        "norm_weight": None if norm is None else torch.rand(norm).to(dtype),
        "gate": apart if input == "gated_rms_norm" else None,
        "small_weight": torch.randn(5, features, dtype=wide),
        "input": input,
        "eps": 1e-6,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 33])
@pytest.mark.parametrize("input", INPUTS)
def test_against_the_reference(input: str, rows: int, dtype: torch.dtype) -> None:
    for features, outputs in ((64, 50), (48, 20)):
        inputs = make(input, rows, features, outputs, dtype)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        for name in (None, "small_weight", "gate"):
            if name is not None:
                inputs[name] = None
            expected, expected_small = decode_linear_reference(**inputs)
            y, small = decode_linear(**inputs)
            assert_close(y, expected, TOLERANCES[dtype], "y")
            residual = torch.randn_like(y)
            expected = expected + residual.double()
            decode_linear_(residual, **{key: value for key, value in inputs.items() if key != "small_weight"})
            assert_close(residual, expected, TOLERANCES[dtype], "residual")
            assert (small is None) == (expected_small is None)
            if small is not None and expected_small is not None:
                assert_close(small, expected_small, TOLERANCES[dtype], "small")
        for name, value in before.items():
            assert inputs[name] is None or torch.equal(inputs[name], value)


def test_the_small_product_does_not_depend_on_the_batch() -> None:
    inputs = make("rms_norm", 40, 64, 32, torch.bfloat16)
    _, whole = decode_linear(**inputs)
    if not whole.is_cuda:  # type: ignore[union-attr]
        pytest.skip("a property of the kernels")
    for rows in (1, 5):
        _, part = decode_linear(**{**inputs, "x": inputs["x"][:rows]})
        assert torch.equal(part, whole[:rows])  # type: ignore[arg-type,index]


def test_messages() -> None:
    good = make("gated_rms_norm", 2, 64, 8, torch.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": "gelu"}, "input must be one of plain, .* got 'gelu'"),
        ({"x": torch.zeros(2, 63)}, r"x must be .* got shape \(2, 63\)"),
        ({"weight": good["weight"].bfloat16()}, "weight must have one of the dtypes float32, got bfloat16"),
        ({"norm_weight": None}, "norm_weight must be given with input gated_rms_norm, got None"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight must be \[V\] .* got shape \(7,\)"),
        ({"input": "rms_norm", "norm_weight": torch.ones(64)}, "gate must be None with input rms_norm"),
        ({"gate": torch.zeros(3, 64)}, r"gate must be .* got shape \(3, 64\)"),
        ({"small_weight": torch.zeros(2, 64, dtype=torch.float64)}, "small_weight must have .* got float64"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            decode_linear(**{**good, **changes})
    del good["small_weight"]
    for residual, message in [
        (torch.zeros(2, 9), r"residual must be .* got shape \(2, 9\)"),
        (torch.zeros(2, 8, dtype=torch.float64), "residual must have .* got float64"),
        (torch.zeros(8, 2).t(), "residual must be contiguous to be updated in place"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_linear_(residual, **good)
