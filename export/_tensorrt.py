"""TensorRT for RTX: its libraries found and loaded, and the GPUs that it builds engines for."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

COMPUTE_CAPABILITIES = {
    80: "A100",
    86: "RTX 30 series, A40",
    89: "RTX 40 series, L40",
    120: "RTX 50 series, RTX PRO Blackwell",
    121: "DGX Spark",
}
"""What engines are built for, and a GPU of each. 75 (Turing) has no float32 products there."""
DEFAULT_COMPUTE_CAPABILITIES = (86, 89, 120)
_ELSEWHERE = {
    75: "its products are float16 alone, and ours keep the router in float32; use --to onnxruntime",
    87: "Jetson Orin takes the TensorRT of its JetPack: use profile='jetpack6' (--profile jetpack6)",
    90: "an H100 or H200 takes PyTorch itself, --to pt2 or --to onnxruntime",
}
_INSTALL = 'run: pip install "mom-compile[tensorrt-rtx]"'


@cache
def require_tensorrt() -> ModuleType:
    """The TensorRT for RTX module, its libraries loaded.

    Raises:
        ImportError: a wheel or a library is missing; the text names the command that installs it.
    """
    if platform.system() != "Linux":
        return _import()
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if libraries is not None and libraries.origin is not None:
        _load_libraries(Path(libraries.origin).parent)
    return _import()


def _import() -> ModuleType:
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):  # of the wheels, of the SDK
        if importlib.util.find_spec(name) is not None:
            try:
                return importlib.import_module(name)
            except ImportError as error:
                raise ImportError(
                    f"{name} must find its libraries, got {error}; tensorrt-rtx-cu13-libs brings them: {_INSTALL}"
                ) from error
    raise ImportError(f"TensorRT for RTX must be installed to build or run engines, got no such package; {_INSTALL}")


def _load_libraries(folder: Path) -> None:
    """Load the wheel's libraries through a folder of links, in which each has its unversioned name as well.

    The ONNX parser opens ``libtensorrt_rtx.so`` by that name to reach its registry of plugins, next to the place it was
    itself loaded from; the wheel has ``libtensorrt_rtx.so.1`` alone.
    """
    files = sorted(folder.glob("libtensorrt*.so.*"))
    if not files:
        raise ImportError(f"{folder} must hold libtensorrt_rtx.so.1, got no library; reinstall it: {_INSTALL}")
    links = Path(tempfile.mkdtemp(prefix="mom-compile-tensorrt-"))
    try:
        for file in files:
            for name in {file.name, file.name[: file.name.index(".so") + 3]}:
                (links / name).symlink_to(file)
        for name in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
            try:
                ctypes.CDLL(str(links / name), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise ImportError(f"{name} must load from {folder}, got {error}; reinstall it: {_INSTALL}") from error
    except BaseException:
        _remove(links)
        raise
    import atexit

    atexit.register(_remove, links)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def check_compute_capabilities(values: Sequence[int]) -> tuple[int, ...]:
    """The compute capabilities in ascending order, each once.

    Raises:
        ValueError: none, or one that TensorRT for RTX does not build for; the text says what to use there.
    """
    known = ", ".join(map(str, COMPUTE_CAPABILITIES))
    if not values:
        raise ValueError(
            f"compute_capabilities must name at least one of {known}, got none; 89 is an RTX 40 series GPU"
        )
    for value in values:
        if value not in COMPUTE_CAPABILITIES:
            advice = _ELSEWHERE.get(value, "give it without the point, as 89 for 8.9")
            raise ValueError(
                f"compute_capabilities must be among {known} for TensorRT for RTX, got {value!r}; {advice}"
            )
    return tuple(sorted(set(values)))
