"""Compilation of the Triton kernels of a training step beside it, on all cores: a step compiles them one by one."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .config import MoMConfig
from .model import MoMForCausalLM
from .ops._launch import Launch, aligned, instead_of_launches
from .ops._library import TRITON_IMPLEMENTATIONS
from .ops._triton import INTERPRET, standing_for_gpu


@contextlib.contextmanager
def precompiling(
    model: MoMForCausalLM, batch: int, length: int, autocast: torch.dtype | None = None, threads: int | None = None
) -> Iterator[None]:
    """Compile the Triton kernels of a training step in threads, while the body runs; on a CPU or interpreted nothing.

    The body is the first step: torch.compile traces it meanwhile, and a launch waits for its kernel. Neither the GPU
    nor the model is touched here. A kernel or a recording that fails is compiled, or reported, by the step itself.

    Args:
        model: on the device, and of the dtype, that it trains in.
        batch: B, sequences of one forward.
        length: T, their tokens.
        autocast: dtype of the autocast around the forward, None for none.
        threads: that compile; None: one per core.
    """
    weight = model.lm_head.weight
    device = weight.device
    launches: list[Launch] = []
    if device.type == "cuda" and not INTERPRET:
        try:
            launches = training_launches(model.config, weight.dtype, batch, length, device, autocast)
        except Exception as error:
            warnings.warn(f"kernels are compiled one by one in the first step: {error!r}", stacklevel=3)
    if not launches:
        yield
        return
    with torch.cuda.device(device), compiling(launches, device, threads):  # Triton compiles for the current device
        yield


def training_launches(
    config: MoMConfig,
    dtype: torch.dtype,
    batch: int,
    length: int,
    architecture: int | torch.device,
    autocast: torch.dtype | None = None,
) -> list[Launch]:
    """One launch for each kernel that a training step compiles, on tensors of the meta device; runs nothing on a GPU.

    A model of one block for each update rule goes forward and backward on tensors without memory. The memory policies
    launch the same kernels: what they compute again is what the forward computed.

    Args:
        config: of the model.
        dtype: of its parameters.
        batch: B, sequences of one forward.
        length: T, their tokens.
        architecture: compute capability times ten of a GPU, or a CUDA device.
        autocast: dtype of the autocast around the forward, None for none.
    """
    rules = list(dict.fromkeys(config.rule(layer) for layer in range(config.num_hidden_layers)))
    config = dataclasses.replace(config, num_hidden_layers=len(rules), update_rule=rules)
    with torch.device("meta"):
        model = MoMForCausalLM(config).to(dtype).train()
    model.set_memory_policy("save")
    launches: list[Launch] = []
    # Tensors that say they are a CPU's: autograd knows no CUDA device where there is none, autocast no meta device.
    with _without_memory(launches, architecture), torch.autocast("cpu", autocast, enabled=autocast is not None):
        model = model.to_empty(device="cpu")
        tokens = torch.empty(batch, length, dtype=torch.int64)
        out = model(tokens, labels=tokens)
        assert out.loss is not None
        out.loss.backward()
    return _distinct(launches)


@contextlib.contextmanager
def compiling(launches: Sequence[Launch], device: torch.device, threads: int | None = None) -> Iterator[list[Any]]:
    """Compile in threads what ``launches`` run on ``device``, the current one; the end waits for the rest.

    Triton and LLVM's passes release the interpreter's lock and ptxas is a process, so that threads do run in parallel.

    Yields:
        One of Triton's futures for each launch that could be submitted; its ``kernel`` is None until it is compiled.
    """
    from triton import AsyncCompileMode

    # Two threads must not enter one JITFunction: it fills its tables of binders and kernels without a lock. Under this
    # mode of Triton's all of that stays on this thread, and the threads do what is behind it, from the syntax tree on.
    submitted: list[Any] = []
    with (
        _one_parser(),
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        # The long ones first: what starts last is waited for.
        for launch in sorted(launches, key=lambda launch: -len(launch.kernel.src)):
            with contextlib.suppress(Exception):  # the launch in the step raises it
                submitted.append(launch.compile(device))
        yield submitted


@contextlib.contextmanager
def _one_parser() -> Iterator[None]:
    """Inside, one thread at a time parses Python.

    CPython 3.11 counts the depth of a syntax tree for all threads together: two at once can end in a SystemError, "AST
    constructor recursion depth mismatch" (python/cpython issue 106905; seen with 3.11.7, not with 3.12.1 and 3.13.0).
    """
    parse, lock = ast.parse, threading.RLock()

    @functools.wraps(parse)
    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return parse(*args, **kwargs)

    ast.parse = one_at_a_time
    try:
        yield
    finally:
        ast.parse = parse


class _TritonImplementations(TorchDispatchMode):
    """Below autograd, run an operator's Triton implementation rather than its fake."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return TRITON_IMPLEMENTATIONS.get(function, function)(*args, **(kwargs or {}))


@contextlib.contextmanager
def _without_memory(launches: list[Launch], architecture: int | torch.device) -> Iterator[None]:
    """Inside, new tensors have no memory and launches are only recorded."""

    def record(launch: Launch) -> None:
        if 0 not in launch.grid:
            launches.append(launch)

    with (
        torch.enable_grad(),
        torch.device("cpu"),
        FakeTensorMode(allow_non_fake_inputs=True),  # the model is one
        _TritonImplementations(),
        standing_for_gpu(),
        instead_of_launches(record, architecture),
    ):
        yield


def _distinct(launches: Sequence[Launch]) -> list[Launch]:
    found: dict[Any, Launch] = {}
    for launch in launches:
        args = tuple(_on_meta(x) if isinstance(x, Tensor) else x for x in launch.args)
        launch = launch._replace(args=args)
        found.setdefault(launch.specialization, launch)
    return list(found.values())


def _on_meta(x: Tensor) -> Tensor:
    """A tensor of which Triton sees the same: its dtype and where it begins."""
    start = 0 if aligned(x) else 1
    return torch.empty(start + 1, dtype=x.dtype, device="meta")[start:]
