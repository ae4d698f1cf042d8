"""The libraries that make operators of ours those of ONNX Runtime: their files, how they are built. No torch."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

INCLUDES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include")
"""Where ONNX Runtime's headers may lie; ONNXRUNTIME_INCLUDE comes first."""


@dataclass(frozen=True)
class OperatorLibrary:
    """A library of custom operators.

    Attributes:
        name: of the file, before the machine's.
        sources: files of ``cpp/``, the one with the operators first.
        optimisation: flags of the compiler.
        libraries: flags of the linker.
    """

    name: str
    sources: tuple[str, ...]
    optimisation: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Of this machine: a folder that moves to another one may hold the libraries of both."""
        return f"{self.name}_{platform.machine()}.so"

    def command(self, compiler: str = "g++", include: str = "<onnxruntime's include folder>") -> list[str]:
        """What builds the library, in the folder of its sources."""
        flags = ["-std=c++17", *self.optimisation, "-shared", "-fPIC", f"-I{include}"]
        return [compiler, *flags, *self.sources, "-o", self.file, *self.libraries]

    def build(self, folder: Path) -> Path | None:
        """Build it in a folder with its sources; None where g++ or the headers are missing."""
        compiler = shutil.which("g++")
        given = os.environ.get("ONNXRUNTIME_INCLUDE")
        found = [path for path in ((given,) if given else INCLUDES) if (Path(path) / "onnxruntime_cxx_api.h").is_file()]
        if compiler is None or not found:
            return None
        subprocess.run(self.command(compiler, found[0]), cwd=folder, check=True)
        return folder / self.file

    def missing(self, folder: Path) -> str | None:
        """How to build the library that a folder lacks; None where it is there."""
        if (folder / self.file).is_file():
            return None
        return f"{folder / self.file} must exist, got no such file; in its folder run: {' '.join(self.command())}"


CUDA_OPERATORS = OperatorLibrary("libmom_onnx", ("mom_onnx.cpp", "mom_launch.cpp"), ("-O2",), ("-ldl",))
"""The functions of a kernel pack, whose files they need beside them."""
CPU_OPERATORS = OperatorLibrary("libmom_cpu", ("mom_cpu.cpp",), ("-O3", "-fopenmp-simd"))
"""A decode step on the CPU."""


def add_cpu_operators(folder: Path) -> None:
    """Put CPU_OPERATORS into a folder: the source and, where it can be built, the library."""
    copy_sources(CPU_OPERATORS.sources, folder)
    if (built := _built_cpu_operators(os.environ.get("ONNXRUNTIME_INCLUDE"))) is not None:
        (folder / CPU_OPERATORS.file).write_bytes(built)


def copy_sources(names: Iterable[str], folder: Path) -> None:
    """Put files of ``cpp/`` into a folder."""
    for name in names:
        (folder / name).write_bytes(resources.files(__package__ or "").joinpath("cpp", name).read_bytes())


@functools.cache
def _built_cpu_operators(include: str | None) -> bytes | None:
    """The library, which is the same for every model; built anew for other headers."""
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(CPU_OPERATORS.sources, Path(folder))
        library = CPU_OPERATORS.build(Path(folder))
        return None if library is None else library.read_bytes()
