"""Every test starts from a fixed seed on one thread; one small artifact serves them all."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graphs
import pytest
import torch

if TYPE_CHECKING:
    from mom_compile import MoMForCausalLM

torch.set_num_threads(1)
# MOM_TEST_DEVICE=cuda runs the operators' and the model's own tests through the GPU's kernels (make test-gpu).
torch.set_default_device(os.environ.get("MOM_TEST_DEVICE", "cpu"))


# The stems of the files that take longest come first: a process that starts one of them last would work on alone.
LONGEST = "onnx pt2 aoti ladder genai compile pretrained demo precision stored_state kernel_pack".split()


def _patch_the_language_once() -> None:
    """Triton's interpreter replaces the language's functions again at every call of a helper: a fifth of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    genuine = getattr(interpreter, "_patch_lang", None)
    if genuine is None:  # another Triton
        return

    def patch(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return None  # the launch has replaced them, and puts them back
        return genuine(fn)

    interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once()


@pytest.fixture(autouse=True, scope="session")
def collect_rarely() -> None:
    """Tracing makes objects by the million, of which few are garbage: Python's collector takes 7 % of an export."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def look_functions_up_once() -> None:
    """torch.onnx looks all that it can translate up again for every graph: an eighth of an export."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        genuine = ONNXRegistry.from_torchlib
    except (AttributeError, ImportError):  # another torch, or no onnxscript
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(genuine))  # type: ignore[method-assign,assignment]


@pytest.fixture(autouse=True, scope="session")
def trace_graphs_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Many tests export the same small models: the folder of a run's graphs serves them all."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir", "onnxscript")):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        graphs.trace_once(patch, _base(tmp_path_factory) / "graphs")
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _base(factory: pytest.TempPathFactory) -> Path:
    """The folder of this run, which its processes share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _written_once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], object]) -> Path:
    """A folder that the first process of this run to need it writes, and the others wait for."""
    import fcntl

    base = _base(factory)
    folder = base / name / "artifact"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            write(folder)
    return folder


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    """A byte-level model and its artifact; tests that change the folder copy it first."""
    from models import tiny_model

    from mom_compile import export

    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256)
    return model, _written_once(tmp_path_factory, "small", functools.partial(export.to_onnx, model))


@pytest.fixture(scope="session")
def pt2_artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoMForCausalLM, Path]:
    """As ``small_artifact``, of ``to_pt2``, with tied embeddings."""
    from models import tiny_model

    from mom_compile import export

    model = tiny_model(num_hidden_layers=1, vocab_size=257, eos_token_id=256, tie_word_embeddings=True)
    return model, _written_once(tmp_path_factory, "pt2", functools.partial(export.to_pt2, model))


@pytest.fixture
def compile_cpp(tmp_path: Path) -> Callable[..., Path]:
    """A function (source, options, libraries) -> the program that g++ made of it."""

    def build(source: Path, options: list[str], libraries: list[str]) -> Path:
        binary = tmp_path / source.stem
        command = ["g++", "-std=c++20", "-O0", *options, str(source), "-o", str(binary), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return binary

    return build


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem.removeprefix("test_").removeprefix("export_"), len(rank)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
