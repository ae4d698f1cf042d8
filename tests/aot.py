"""Ahead-of-time compilation of the Triton kernels, for any GPU and without one."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mom_compile.ops as ops
from mom_compile.ops._kernel_variant import KernelVariant
from mom_compile.ops._launch import options


@dataclass(frozen=True)
class Resources:
    """What one thread block, and one thread, of a compiled kernel takes."""

    shared: int
    registers: int
    spills: int


def collect() -> list[KernelVariant]:
    """The variants of every operator package whose launch module lists them."""
    found: list[KernelVariant] = []
    for package in pkgutil.iter_modules(ops.__path__):
        if package.ispkg and (Path(next(iter(ops.__path__))) / package.name / "launch.py").exists():
            launch = importlib.import_module(f"{ops.__name__}.{package.name}.launch")
            found.extend(getattr(launch, "variants", tuple)())
    return found


def name_of(variant: KernelVariant) -> str:
    package = variant.kernel.fn.__module__.split(".")[-2]
    return f"{package}.{variant.kernel.fn.__name__} {variant.label}"


def compile_variant(variant: KernelVariant, architecture: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    missing = set(names) - set(variant.signature) - set(variant.constants)
    unknown = (set(variant.signature) | set(variant.constants)) - set(names)
    assert not missing and not unknown, f"arguments missing {sorted(missing)}, unknown {sorted(unknown)}"
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    # As the launcher finds them: torch allocates at multiples of 16 bytes.
    aligned: dict[Any, Any] = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options(variant.num_warps, variant.num_stages))
    registers, spills = _usage(compiled.asm["cubin"])
    return Resources(compiled.metadata.shared, registers, spills)


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
