"""Every Triton kernel configuration compiles for every GPU it serves, with none of the hazards of ``_ptx_lint``."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from aot import collect, name_of
from support import INTERPRET

from mom_compile.ops._aot import compile_variant
from mom_compile.ops._kernel_variant import SHARED_MEMORY_KB, KernelVariant
from mom_compile.ops._launch import Config, Launch

triton = pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

VARIANTS = collect()
# Triton makes the same program for these as for sm_86, which has no more shared memory than any of them.
LIKE_86 = (87, 89)


def _cases() -> list[object]:
    return [
        pytest.param(
            variant,
            architecture,
            id=f"sm{architecture}-{name_of(variant)}",
            marks=[] if variant.quick and architecture not in LIKE_86 else [pytest.mark.kernels],
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


@pytest.mark.parametrize("name", ["chunk_out_kernel", "decode_row_kernel", "grouped_linear_dweight_kernel"])
def test_programs_like_those_of_sm_86(name: str) -> None:
    variant = next(v for v in VARIANTS if v.quick and v.kernel.fn.__name__ == name and 86 in v.architectures)
    programs = [compile_variant(variant, architecture).ptx for architecture in (86, *LIKE_86)]
    assert len({re.sub(r"\.target sm_\d+", "", program) for program in programs}) == 1


def test_a_traced_launch_has_no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inline assembly would make the graph copy every argument; one stage needs none."""
    traced: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: {(1,): lambda **given: traced.append(given)})
    for stages, fence in ((3, True), (2, False)):
        Launch(None, (1,), Config({"FENCE": fence}, 4, stages), ()).trace()
    assert traced == [
        {"FENCE": False, "num_warps": 4, "num_stages": 1},
        {"FENCE": False, "num_warps": 4, "num_stages": 2},
    ]
