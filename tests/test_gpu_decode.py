"""Decoding on a GPU: repeatable, equal to one pass, as fast after 100k tokens as after 1k, clean under memcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
import torch
from support import assert_close

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.decode import DecodeSession

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


def _model(topk: int = 2) -> MoMForCausalLM:
    """Two layers of the 512M model's shape."""
    config = MoMConfig(vocab_size=1000, hidden_size=1024, num_hidden_layers=2, hidden_ratio=3, topk=topk)
    torch.manual_seed(0)
    return MoMForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 16, 20, 40])
def test_fifty_runs_are_bit_equal(batch: int) -> None:
    model = _model().bfloat16()
    ids = torch.randint(0, 1000, (batch, 72))
    state = model(ids[:, :64]).state
    session = DecodeSession(model, batch)
    first: list[torch.Tensor] = []
    for _ in range(50):
        session.load(state)
        logits = torch.stack([session.step(ids[:, t]).clone() for t in range(64, 72)])
        now = [logits, *(value for layer in session.state() for value in layer.values())]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 3e-2)])
def test_512_steps_equal_one_pass(dtype: torch.dtype, tolerance: float) -> None:
    # Below float32 every memory is selected: rounding cannot change the routing.
    model = _model(topk=2 if dtype == torch.float32 else 4).to(dtype)
    ids = torch.randint(0, 1000, (5, 64 + 512))
    expected = model(ids)
    session = DecodeSession(model, 5)
    session.load(model(ids[:, :64]).state)
    logits = torch.stack([session.step(ids[:, t]).clone() for t in range(64, ids.shape[1])], 1)
    assert_close(logits, expected.logits[:, 64:], tolerance, "logits")
    for after, wanted in zip(session.state(), expected.state, strict=True):
        assert_close(after["recurrent_state"], wanted["recurrent_state"], tolerance, "recurrent_state")


@torch.no_grad()
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_100k_steps(state: torch.dtype) -> None:
    """The state stays finite and bounded; a token takes as long after 100k of them as after 1k (within 2%)."""
    model = _model().bfloat16()
    session, ids = DecodeSession(model, 1, dtype=state), torch.randint(0, 1000, (1000, 1))

    def run(steps: int) -> None:
        for t in range(steps):
            session.step(ids[t % 1000])

    def norm() -> float:
        return max(float(layer["recurrent_state"].float().norm()) for layer in session.state())

    def token_ms() -> float:
        times = []
        for _ in range(30):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                session._graph.replay()  # type: ignore[union-attr]
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 20)
        return sorted(times)[len(times) // 2]

    run(1000)
    early, early_ms = norm(), token_ms()
    norms = []
    for _ in range(9):
        run(11000)
        norms.append(norm())
    late_ms = token_ms()
    print(f"{state}: norm {early:.1f} at 1k, {max(norms):.1f} at most until 100k; {early_ms:.4f} and {late_ms:.4f} ms")
    assert all(value < 2 * early for value in norms)  # also refuses NaN
    assert max(norms[5:]) < 1.1 * max(norms[:5])
    assert abs(late_ms / early_ms - 1) < 0.02


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(iter(glob("/usr/local/cuda*/bin/compute-sanitizer")), None)


MEMCHECK = """
import torch
from test_decode_linear import make as linear
from test_decode_step import make as step
from mom_compile.ops import decode_linear, decode_step
torch.set_default_device("cuda")
for shape in ({"K": 20, "V": 36, "H": 1, "HV": 3}, {"K": 100, "V": 7, "M": 5, "topk": 3, "width": 3}):
    decode_step(**step(dtype=torch.bfloat16, norm=True, gate=True, **shape))
for rows, features, outputs in ((3, 44, 70), (7, 44, 70), (19, 300, 34), (40, 300, 34)):
    decode_linear(**linear(rows, features, outputs, torch.bfloat16, "plain", True))
torch.cuda.synchronize()
"""


@pytest.mark.skipif(_sanitizer() is None, reason="needs compute-sanitizer")
def test_memcheck() -> None:
    tests = Path(__file__).parent
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *filter(None, sys.path)])
    command = [str(_sanitizer()), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", MEMCHECK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
