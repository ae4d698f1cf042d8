"""Every Triton kernel configuration compiles for every GPU it serves, with none of the hazards of ``_ptx_lint``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
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
# What is special to these is products or shared memory: one quick variant of each kernel, of 16 bits if it has one.
ONCE = (80, 100, 120)


def _types(variant: KernelVariant) -> frozenset[tuple[str, str]]:
    return frozenset(variant.signature.items())


def _program(variant: KernelVariant) -> Hashable:
    """What the compiled kernel depends on: variants of other labels may be the same program."""
    constants = frozenset((name, repr(value)) for name, value in variant.constants.items())
    return variant.kernel, _types(variant), constants, variant.num_warps, variant.num_stages, variant.registers


def _configuration(variant: KernelVariant) -> Hashable:
    """As ``_program``, whatever the dtypes of the pointers."""
    kinds = {name: "*" if kind.startswith("*") else kind for name, kind in variant.signature.items()}
    return _program(replace(variant, signature=kinds))


def _asynchronous(variant: KernelVariant) -> bool:
    """Whether its products, if it has any, may be ``wgmma``."""
    return "*bf16" in variant.signature.values() or variant.constants.get("PRECISION") == "tf32"


def _first(variants: Iterable[KernelVariant], key: Callable[[KernelVariant], Hashable]) -> dict[int, KernelVariant]:
    """The first variant of each key, by its identity."""
    found: dict[Hashable, KernelVariant] = {}
    for variant in variants:
        found.setdefault(key(variant), variant)
    return {id(variant): variant for variant in found.values()}


def _cases() -> list[object]:
    """Each program once for an architecture; without ``make kernels``, the quick variants.

    ``make kernels-sm90`` leaves to ``make kernels`` (slow) what float32 repeats, which has no asynchronous products:
    where bfloat16 has the configuration as well, one of each kernel and signature is enough.
    """
    cases: list[object] = []
    for architecture in SHARED_MEMORY_KB:
        served = [variant for variant in VARIANTS if architecture in variant.architectures]
        # Of those that are one, a quick one, and of the last dtype.
        programs = _first(sorted(reversed(served), key=lambda variant: not variant.quick), _program)
        once = _first(programs.values(), lambda variant: variant.kernel)
        whole = [variant for variant in programs.values() if _asynchronous(variant)]
        others = _first([*whole, *programs.values()], _configuration)
        new = {id(variant): variant for variant in whole} | others
        new |= _first(programs.values(), lambda variant: (variant.kernel, _types(variant)))
        for key, variant in programs.items():
            marks = [] if key in new else [pytest.mark.kernels, pytest.mark.slow]
            if not variant.quick or architecture in LIKE_86 or (architecture in ONCE and key not in once):
                marks.append(pytest.mark.kernels)
            cases.append(pytest.param(variant, architecture, id=f"sm{architecture}-{name_of(variant)}", marks=marks))
    return cases


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
