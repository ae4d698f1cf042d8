"""Every Triton kernel configuration compiles for every GPU it serves, with none of the hazards of ``_ptx_lint``."""

from __future__ import annotations

import pytest
from aot import collect, name_of
from support import INTERPRET

from mom_compile.ops._aot import compile_variant
from mom_compile.ops._kernel_variant import SHARED_MEMORY_KB, KernelVariant

triton = pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

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
def test_compiles_without_hazards(variant: KernelVariant, architecture: int) -> None:
    assert compile_variant(variant, architecture).hazards == ()
