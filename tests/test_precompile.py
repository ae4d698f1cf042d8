"""The kernels of a training step, recorded without memory and compiled before it."""

from __future__ import annotations

import ast
import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from support import INTERPRET, ON_GPU

from mom_compile import MoMForCausalLM
from mom_compile.memory_policy import MEMORY_POLICIES
from mom_compile.ops._launch import Launch, instead_of_launches
from mom_compile.ops._triton import standing_for_gpu
from mom_compile.precompile import compiling, precompiling, training_launches

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

AMPERE, HOPPER = 80, 90


def _names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.fn.__name__ for launch in launches]


def _launched(model: MoMForCausalLM, autocast: bool = False) -> set[Any]:
    """What a step on tensors with memory launches, of which none runs: results are whatever was there."""
    found: list[Launch] = []
    tokens = torch.randint(0, model.config.vocab_size, (2, 70))
    with standing_for_gpu(), instead_of_launches(found.append, AMPERE):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens).loss
        assert loss is not None
        loss.backward()
    return {launch.specialization for launch in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["gated_delta", "mamba2", "delta", "linear"])
def test_what_is_recorded_is_what_a_step_launches(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mom_compile.ops._library.use_triton", lambda _: True)
    model = tiny_model(rule).to(dtype).train()
    recorded = {launch.specialization for launch in training_launches(model.config, dtype, 2, 70, AMPERE)}
    for policy in MEMORY_POLICIES:
        model.set_memory_policy(policy)
        assert _launched(model) == recorded, policy


def test_what_is_recorded_under_autocast_is_what_a_step_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mom_compile.ops._library.use_triton", lambda _: True)
    model = tiny_model(num_hidden_layers=1).train()
    recorded = training_launches(model.config, torch.float32, 2, 70, AMPERE, torch.bfloat16)
    assert _launched(model, autocast=True) == {launch.specialization for launch in recorded}


def test_recording_leaves_no_trace() -> None:
    model = tiny_model(num_hidden_layers=1)
    random = torch.get_rng_state()
    with torch.no_grad():
        first = training_launches(model.config, torch.bfloat16, 8, 2048, HOPPER)
    assert torch.equal(torch.get_rng_state(), random)
    assert {x.device.type for launch in first for x in launch.args if isinstance(x, torch.Tensor)} == {"meta"}
    second = training_launches(model.config, torch.bfloat16, 8, 2048, HOPPER)
    assert [launch.specialization for launch in first] == [launch.specialization for launch in second]
    assert len({launch.specialization for launch in first}) == len(first)
    with torch.no_grad():  # no operator takes its tensors for a GPU's any more
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_every_rule_of_a_model_is_recorded() -> None:
    rules = ["gated_delta", "linear", "gated_delta"]
    config = tiny_model(rules, num_hidden_layers=3).config
    scans = [
        name
        for name in _names(training_launches(config, torch.bfloat16, 2, 128, AMPERE))
        if name == "chunk_scan_bwd_kernel"
    ]
    assert len(scans) == 2


@pytest.mark.skipif(ON_GPU, reason="of a CPU")
def test_nothing_is_compiled_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mom_compile.precompile.compiling", None)
    with precompiling(tiny_model(num_hidden_layers=1), 2, 64):
        pass


class _Driver:
    """One GPU of compute capability 9.0 that runs nothing."""

    def __getattr__(self, name: str) -> Any:
        from triton.backends.compiler import GPUTarget

        values = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": GPUTarget("cuda", 90, 32)}
        return lambda *_: values[name]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    """Three kernels that compile fast, none of them compiled yet."""
    from triton.runtime.driver import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr("mom_compile.ops._launch._overlaps", lambda _: True)
    launches = training_launches(tiny_model(num_hidden_layers=1).config, torch.bfloat16, 2, 128, HOPPER)
    chosen = [x for x in launches if x.kernel.fn.__name__ in ("route_fwd_kernel", "to_rows_kernel", "count_kernel")]
    yield chosen
    for launch in chosen:
        launch.kernel.device_caches.clear()


@pytest.mark.skipif(INTERPRET or ON_GPU, reason="compiles, for a GPU that is not there")
def test_a_compiled_kernel_is_found_and_a_failure_does_not_count(
    monkeypatch: pytest.MonkeyPatch, short: list[Launch]
) -> None:
    from triton.runtime.jit import JITFunction

    wrong = Launch(short[0].kernel, (1,), short[0].config, ())  # arguments are missing
    failing = Launch(short[0].kernel, (1,), short[0].config, (1.0, *short[0].args[1:]))  # a number for a pointer
    compilations = []
    compile_one = JITFunction._do_compile

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        compilations.append(self)
        return compile_one(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    device = torch.device("cuda", 0)
    with compiling([wrong, failing, *short], device, threads=2) as submitted:
        compilations.clear()
        for launch in short:  # the step in the body finds each on its way, and waits for it
            assert launch.compile(device).result() is not None
        assert not compilations
    assert sum(each.kernel is not None for each in submitted) == len(short) == 3
    for launch in short:
        launch.compile(device)
    assert not compilations
    with pytest.raises(Exception, match="pointer|ptr|fp32|float"):  # the step raises what was hidden here
        failing.compile(device)


@pytest.mark.skipif(INTERPRET or ON_GPU, reason="compiles, for a GPU that is not there")
def test_one_thread_at_a_time_parses(monkeypatch: pytest.MonkeyPatch, short: list[Launch]) -> None:
    parse, busy, threads, together = ast.parse, threading.Lock(), set(), []

    def slow(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        if not busy.acquire(blocking=False):
            together.append(args[0])
            return parse(*args, **kwargs)
        try:
            time.sleep(0.05)
            return parse(*args, **kwargs)
        finally:
            busy.release()

    monkeypatch.setattr(ast, "parse", slow)
    with compiling(short, torch.device("cuda", 0), threads=3) as submitted:
        pass
    assert all(each.kernel is not None for each in submitted) and len(submitted) == 3
    assert len(threads) > 1, "nothing was parsed beside something else"
    assert not together
    assert ast.parse is slow  # as it was
