"""Plugins for Torch-TensorRT: their kernels compile here; the engines need its libraries and a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support import INTERPRET
from torch import Tensor, nn

from mom_compile.export.torch_tensorrt_plugins import gated_rms_norm_variant, register_plugins, route_variant
from mom_compile.ops import gated_rms_norm, route
from mom_compile.ops._aot import compile_variant

pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None


@pytest.mark.parametrize("architecture", [86, 90])
def test_kernels_compile_in_the_plugins_order(architecture: int) -> None:
    """Inputs, whole numbers, outputs, then Triton's own pointers."""
    for variant, numbers in ((gated_rms_norm_variant(64, 1e-6, "bf16"), [3]), (route_variant(4, 2), [1])):
        binary = compile_variant(variant, architecture)
        assert binary.hazards == ()
        assert f".entry {binary.symbol}(" in binary.ptx
        kinds = [variant.signature[name] for name in variant.kernel.arg_names if name in variant.signature]
        assert [i for i, kind in enumerate(kinds) if kind == "i32"] == numbers


@pytest.mark.skipif(INSTALLED, reason="torch-tensorrt is installed")
def test_without_the_libraries() -> None:
    with pytest.raises(ImportError, match=r'pip install "mom-compile\[torch-tensorrt\]"'):
        register_plugins()


class _Both(nn.Module):
    def forward(self, x: Tensor, gate: Tensor, weight: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices = route(logits, 2)
        return gated_rms_norm(x, gate, weight), weights, indices


@pytest.mark.torch_tensorrt
@pytest.mark.skipif(not INSTALLED or not torch.cuda.is_available(), reason="needs torch-tensorrt and a GPU")
def test_engines_equal_the_operators() -> None:
    import torch_tensorrt

    register_plugins()
    torch.manual_seed(0)
    x, gate, weight, logits = (torch.randn(*shape, device="cuda") for shape in ((70, 64), (70, 64), (64,), (70, 4)))
    model = _Both().eval()
    compiled = torch_tensorrt.compile(model, inputs=[x, gate, weight, logits], min_block_size=1)
    for got, expected in zip(compiled(x, gate, weight, logits), model(x, gate, weight, logits), strict=True):
        assert torch.equal(got.to(expected.dtype), expected)
