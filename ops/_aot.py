"""Ahead-of-time compilation of the Triton kernels, for any GPU and without one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ._kernel_variant import KernelVariant
from ._launch import options
from ._ptx_lint import lint
from ._ttgir_lint import overwritten_operands


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        symbol: the entry point's name.
        architecture: compute capability times ten.
        ptx, cubin: what Triton gave to ptxas, and what ptxas made of it.
        shared: bytes of dynamic shared memory of a thread block.
        registers, spills: of one thread; spills in bytes.
        hidden: pointers that the entry point takes after the kernel's own arguments (Triton's scratch memory, unused).
        hazards: what :func:`~mom_compile.ops._ptx_lint.lint` and
            :func:`~mom_compile.ops._ttgir_lint.overwritten_operands` found.
    """

    symbol: str
    architecture: int
    ptx: str
    cubin: bytes
    shared: int
    registers: int
    spills: int
    hidden: int
    hazards: tuple[str, ...]


def compile_variant(variant: KernelVariant, architecture: int) -> Binary:
    """Compile for ``sm_<architecture>``, pointers aligned to 16 bytes as torch allocates them.

    Raises:
        AssertionError: the variant's arguments are not those of its kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    missing = set(names) - set(variant.signature) - set(variant.constants)
    unknown = (set(variant.signature) | set(variant.constants)) - set(names)
    assert not missing and not unknown, f"arguments missing {sorted(missing)}, unknown {sorted(unknown)}"
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned: dict[Any, Any] = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    settings = options(variant.num_warps, variant.num_stages, variant.registers)

    def build(again: bool) -> tuple[Any, str]:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), io.StringIO() as log:
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile |= again
            with contextlib.redirect_stdout(log):
                compiled = triton.compile(source, target=target, options=settings)
            return compiled, log.getvalue()

    compiled, log = build(False)
    ptx, cubin, shared = compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared
    if "wgmma" in ptx:  # Triton's cache keeps no messages, so they are put there beside the kernel
        key = hashlib.sha256(f"{triton.__version__} {architecture} {ptx}".encode()).hexdigest()
        cache_of = triton.runtime.cache.get_cache_manager(key)
        known = cache_of.get_file("ptxas.log")
        if not log:
            log = build(True)[1] if known is None else Path(known).read_text()
        if known is None:
            cache_of.put(log, "ptxas.log", binary=False)
    registers, spills = _usage(cubin)
    entry = re.search(r"\.entry [^(]*\(([^)]*)\)", ptx)
    assert entry is not None
    taken = len(re.findall(r"\.param\s", entry[1]))
    return Binary(
        symbol=compiled.metadata.name,
        architecture=architecture,
        ptx=ptx,
        cubin=cubin,
        shared=shared,
        registers=registers,
        spills=spills,
        hidden=taken - len(variant.signature),
        hazards=tuple(lint(ptx, log, architecture, shared, spills) + overwritten_operands(compiled.asm["ttgir"])),
    )


@cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, out of the binary that ptxas made. The kernels keep no arrays, so that
    whatever lies on the stack was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
