"""The decode kernels inside NaN: every buffer is the middle of a larger one that must stay as it is."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support import INTERPRET, ON_GPU, cover
from test_decode_linear import make as make_linear
from test_decode_step import make as make_step
from torch import Tensor
from torch.overrides import TorchFunctionMode

if not (INTERPRET or ON_GPU):
    pytest.skip("for the kernels, interpreted or on a GPU", allow_module_level=True)

BAND = 256
"""Elements before and behind a buffer."""


class Guards(TorchFunctionMode):
    """``new_empty`` gives the middle of a NaN-filled buffer, as :meth:`guard` does with a copy of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def _middle(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        if dtype.is_floating_point:
            fill = torch.nan
        else:
            fill = 1 if dtype == torch.bool else max(-(1 << 40), torch.iinfo(dtype).min)
        buffer = torch.full((size + 2 * BAND,), fill, dtype=dtype, device=device)
        self.buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(shape)

    def guard(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self._middle(tuple(value.shape), value.dtype, value.device).copy_(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.new_empty:
            shape = args[1] if isinstance(args[1], tuple | list) else args[1:]
            return self._middle(tuple(shape), (kwargs or {}).get("dtype") or args[0].dtype, args[0].device)
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        assert len(self.buffers) > 2
        for buffer, size in self.buffers:
            if buffer.dtype.is_floating_point:
                assert buffer[:BAND].isnan().all() and buffer[BAND + size :].isnan().all()
                assert torch.isfinite(buffer[BAND : BAND + size]).all()


def _launch(name: str) -> Any:
    return importlib.import_module(f"mom_compile.ops.{name}.launch")


@pytest.mark.parametrize(
    ("shape", "dtype", "state"),
    cover(
        [{"K": 20, "V": 36, "H": 1, "HV": 3}, {"K": 100, "V": 7, "M": 5, "topk": 3, "width": 3}],
        [torch.float32, torch.bfloat16],
        [torch.float32, torch.bfloat16],
        keep=lambda shape, dtype, state: (dtype == state) == (shape["K"] == 20),
    ),
)
def test_decode_step(shape: dict[str, Any], dtype: torch.dtype, state: torch.dtype) -> None:
    inputs = make_step("gated_delta", dtype, state, batch=3, tokens=1, norm=True, gate=True, **shape)
    guards = Guards()
    order = importlib.import_module("mom_compile.ops.decode_step.op").Arguments._fields
    values = [guards.guard(inputs[name]) for name in order]
    with guards:
        o = _launch("decode_step").decode_step(*values)
    assert torch.isfinite(o).all()
    guards.check()


ROWS = [1, 3, 7, 19, 33]


@pytest.mark.parametrize(
    ("sizes", "swiglu", "rows"),
    cover(
        [(44, 70), (300, 34)],
        [False, True],
        ROWS,
        keep=lambda sizes, swiglu, rows: (swiglu + ROWS.index(rows)) % 2 == (sizes[0] == 44),
    ),
)
def test_decode_linear(sizes: tuple[int, int], swiglu: bool, rows: int) -> None:
    features, outputs = sizes
    for norm in ("none", "plain", "weight"):
        inputs = make_linear(rows, features, outputs, torch.bfloat16, norm, swiglu)
        guards = Guards()
        order = ("x", "weight", "norm_weight", "small_weight", "norm", "swiglu", "eps")
        values = [guards.guard(inputs[name]) for name in order]
        residual = (
            guards.guard(torch.randn(rows, outputs, dtype=torch.bfloat16)) if norm == "none" and not swiglu else None
        )
        with guards:
            y, small = _launch("decode_linear").decode_linear(*values, y=residual)
        assert torch.isfinite(y).all() and torch.isfinite(small).all()
        guards.check()
