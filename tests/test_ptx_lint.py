"""The lint of compiled kernels finds each hazard that it knows, and nothing in good kernels."""

from __future__ import annotations

import re

import pytest
from support import INTERPRET

from mom_compile.ops._aot import Binary, compile_variant
from mom_compile.ops._kernel_variant import KernelVariant
from mom_compile.ops._ptx_lint import SPILL_LIMIT, lint, statements, unfenced_products
from mom_compile.ops._ttgir_lint import overwritten_operands

triton = pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

WRITE = "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};"
MATRIX_WRITE = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3, %r4, %r5};"
FENCE = "fence.proxy.async.shared::cta;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
FROM_REGISTERS = PRODUCT.replace("%rd1", "{%r1,%r2,%r3,%r4}")
COPY = "cp.async.cg.shared.global [%r1], [%rd3], 16;"
LOOP_HEAD, LOOP_TAIL = "$L__BB0_1:", "@%p2 bra $L__BB0_1;"


def _program(*lines: str) -> str:
    body = "\n".join(("// begin inline asm", *lines, "ret;"))
    return f".version 8.7\n.target sm_90a\n.visible .entry kernel(\n.param .u64 p0\n)\n.reqntid 128\n{{\n{body}\n}}\n"


def _compile(
    name: str, num_warps: int = 4, num_stages: int = 1, N: int = 64, kind: str = "*bf16", fence: bool = False
) -> Binary:
    import bad_kernels

    kernel = getattr(bad_kernels, name)
    types = {"a": kind, "b": kind, "out": "*fp32", "steps": "i32"}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    constants = {"N": N} | ({"FENCE": fence} if "FENCE" in kernel.arg_names else {})
    return compile_variant(KernelVariant(name, kernel, signature, constants, num_warps, num_stages), 90)


@pytest.mark.parametrize(
    ("lines", "unfenced"),
    [
        pytest.param((WRITE, FENCE, PRODUCT), False, id="fenced"),
        pytest.param((WRITE, PRODUCT), True, id="not fenced"),
        pytest.param((FENCE, WRITE, PRODUCT), True, id="fenced too early"),
        pytest.param((MATRIX_WRITE, PRODUCT), True, id="matrix"),
        pytest.param((WRITE, ".loc 1 114 29 // kernels.py:114:29", FENCE, PRODUCT), False, id="behind a directive"),
        pytest.param((WRITE, "@%p1 " + FENCE, PRODUCT), True, id="fenced by some threads"),
        pytest.param((WRITE, "@%p1 bra $L__BB0_1;", FENCE, LOOP_HEAD, PRODUCT), True, id="a path around the fence"),
        pytest.param((LOOP_HEAD, PRODUCT, WRITE, LOOP_TAIL), True, id="written by the round before"),
        pytest.param((LOOP_HEAD, FENCE, PRODUCT, WRITE, LOOP_TAIL), False, id="fenced in the next round"),
        pytest.param((COPY, "cp.async.wait_group 0;", FENCE, PRODUCT), False, id="copied and fenced"),
        pytest.param((COPY, "cp.async.wait_group 0;", PRODUCT), True, id="copied"),
        pytest.param((COPY, FENCE, "cp.async.wait_group 0;", PRODUCT), True, id="fenced before the copy is done"),
        pytest.param((COPY, COPY, "cp.async.wait_group 1;", FENCE, PRODUCT), False, id="one copy is on its way"),
        pytest.param(
            (COPY, "cp.async.wait_group 1;", FENCE, "cp.async.wait_group 0;", PRODUCT), True, id="waited for later"
        ),
        pytest.param((WRITE, "ld.shared.b32 %r1, [%r2];"), False, id="no product"),
    ],
)  # fmt: skip
def test_unfenced_products(lines: tuple[str, ...], unfenced: bool) -> None:
    found = lint(_program(*lines), "", 90, 0, 0)
    assert len(found) == unfenced
    assert all("with no fence.proxy.async between them" in text for text in found)


def test_lines_are_those_of_the_file() -> None:
    program = _program(WRITE, PRODUCT)
    at = [i for i, line in enumerate(program.splitlines(), 1) if line in (WRITE, PRODUCT)]
    assert unfenced_products(program) == [
        f"wgmma in line {at[1]} after a write to shared memory in line {at[0]} with no fence.proxy.async between them"
    ]
    by_line = {statement.line: statement.text for statement in statements(program)}
    assert by_line[at[0]] == WRITE.rstrip(";")


def test_operands_in_registers() -> None:
    assert lint(_program(PRODUCT), "", 90, 0, 0) == []
    assert "wgmma with an operand in registers" in lint(_program(FROM_REGISTERS), "", 90, 0, 0)[0]


def test_resources_and_messages() -> None:
    assert lint(_program(), "ptxas info : Used 64 registers", 90, 227 * 1024, SPILL_LIMIT) == []
    assert lint(_program(), "", 90, 0, SPILL_LIMIT + 1) == ["513 bytes spilled per thread, more than 512"]
    assert lint(_program(), "", 86, 101377, 0) == ["101377 bytes of shared memory, more than the 101376 of sm_86"]
    log = (
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in function 'kernel'"
    )
    assert lint(_program(), log, 90, 0, 0) == ["ptxas serialised the wgmma products"]


def test_a_compiled_product_of_a_product() -> None:
    assert any("operand in registers" in text for text in _compile("product_of_product").hazards)


def test_a_compiled_kernel_that_spills() -> None:
    spilling = _compile("too_many_values", N=256, kind="*fp32")
    assert spilling.spills > SPILL_LIMIT
    assert any("bytes spilled per thread" in text for text in spilling.hazards)


def test_a_compiled_kernel_over_the_shared_memory() -> None:
    large = _compile("product_of_loads", num_stages=8, N=128)
    assert any("bytes of shared memory" in text for text in large.hazards)


def test_a_compiled_product_of_loads() -> None:
    """Without its fences a good kernel is a bad one; Triton before 3.7.1 omits them by itself in a pipelined loop."""
    good = _compile("product_of_loads")
    assert good.hazards == ()
    assert "wgmma.mma_async" in good.ptx and FENCE in good.ptx
    assert len(unfenced_products(re.sub(r"fence\.proxy\.async\S*;", "", good.ptx))) == 1
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    assert bool(_compile("product_of_loads", num_stages=3).hazards) == (version < (3, 7, 1))


def test_a_fence_of_our_own() -> None:
    assert _compile("product_of_loads", num_stages=3, fence=True).hazards == ()


@pytest.mark.parametrize("waits", [False, True])
def test_a_copy_over_an_operand(waits: bool) -> None:
    import bad_kernels

    kernel, kinds = bad_kernels.product_and_sum_of_a_load, ("*bf16", "*bf16", "*fp32", "*fp32", "i32")
    signature = dict(zip(kernel.arg_names, kinds, strict=False))
    variant = KernelVariant("", kernel, signature, {"N": 64, "WAIT": waits}, 4, 3)
    assert any("copies into" in text for text in compile_variant(variant, 90).hazards) != waits


LOOP = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable>
    %a_0 = ttg.memdesc_index %a[%c0] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %t_0 = ttg.async_copy_global_to_local %p, %a_0 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    %a_1 = ttg.memdesc_index %a[%c1] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %t_1 = ttg.async_copy_global_to_local %p, %a_1 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
    %r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %zero) -> (tensor<64x64xf32>) : i32 {{
      %a_2 = ttg.memdesc_index %a[%j] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %d = ttng.warp_group_dot %a_2, %b, %acc {{inputPrecision = 0 : i32, isAsync = true}} : !ttg.memdesc<64x64xbf16>
      %w:2 = ttng.warp_group_dot_wait %d, %a_2 {{pendings = {pendings} : i32}} : tensor<64x64xf32>
      %a_3 = ttg.memdesc_index %a[%l] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %t_3 = ttg.async_copy_global_to_local %p, %a_3 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
      scf.yield %w#0, %t_3 : tensor<64x64xf32>
    }}
"""


@pytest.mark.parametrize(("buffers", "pendings", "bad"), [(2, 1, True), (3, 1, False), (2, 0, False), (1, 0, False)])
def test_copies_and_the_products_under_way(buffers: int, pendings: int, bad: bool) -> None:
    assert bool(overwritten_operands(LOOP.format(buffers=buffers, pendings=pendings))) == bad


def test_messages_are_read_when_the_kernel_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 256 sums of 4 warps exceed the registers of a thread."""
    first = _compile("product_of_product", num_warps=8, N=256)
    assert any("serialised" in text for text in first.hazards)
    assert _compile("product_of_product", num_warps=8, N=256).hazards == first.hazards
