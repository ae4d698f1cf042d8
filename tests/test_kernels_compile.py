"""Every Triton kernel configuration compiles for every GPU it serves, within its shared memory and registers."""

from __future__ import annotations

import pytest
from aot import collect, compile_variant, name_of
from support import INTERPRET

from mom_compile.ops._kernel_variant import SHARED_MEMORY_KB, KernelVariant

triton = pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

SPILL_LIMIT = 512
"""Bytes that one thread may spill."""
VARIANTS = collect()


def _cases() -> list[object]:
    return [
        pytest.param(
            variant,
            architecture,
            id=f"sm{architecture}-{name_of(variant)}",
            marks=[] if variant.quick else [pytest.mark.kernels],
        )
        for architecture in SHARED_MEMORY_KB
        for variant in VARIANTS
        if architecture in variant.architectures
    ]


def test_every_kernel_has_a_quick_variant() -> None:
    kernels = {variant.kernel for variant in VARIANTS}
    assert len(kernels) >= 15
    assert kernels == {variant.kernel for variant in VARIANTS if variant.quick}


@pytest.mark.parametrize(("variant", "architecture"), _cases())
def test_compiles(variant: KernelVariant, architecture: int) -> None:
    used = compile_variant(variant, architecture)
    assert used.shared <= SHARED_MEMORY_KB[architecture] * 1024, f"{used.shared} bytes of shared memory"
    assert used.spills <= SPILL_LIMIT, f"{used.spills} bytes spilled"
