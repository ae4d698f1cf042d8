"""Prefill and decode hold one copy of the weights, on disk and loaded; a large model exports within its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mom_compile import MoMConfig, MoMForCausalLM, export

ROOT = Path(__file__).parent.parent
# Memory that the process alone holds, and its share of what is mapped: a file mapped twice counts once.
LOADED = """
import sys
from mom_compile import export

def held():
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("Pss:"))

import numpy, onnxruntime
before = held()
runner = export.load(sys.argv[1])
logits, state = runner([[1, 2, 3]])
step = runner.decode_loop(state, 1)
for _ in range(3):
    step(numpy.array([1]))
print(held() - before)
"""
EXPORTED = """
import resource, sys
from mom_compile import MoMConfig, MoMForCausalLM, export

model = MoMForCausalLM(MoMConfig(hidden_size=2048, num_hidden_layers=1, num_heads=8, head_dim=256)).eval()
weights = 4 * sum(parameter.numel() for parameter in model.parameters())
before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - weights
export.to_onnx(model, sys.argv[1])
print((1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / weights)
"""


def _run(code: str, folder: Path) -> float:
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_one_copy_of_the_weights(tmp_path: Path) -> None:
    """40 MB of them: large against the sessions themselves."""
    config = MoMConfig(
        vocab_size=4096, hidden_size=768, num_hidden_layers=1, num_heads=2, head_dim=32, num_memories=2, topk=1
    )
    model = MoMForCausalLM(config).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    export.to_onnx(model, tmp_path / "x")
    files = json.loads((tmp_path / "x" / "manifest.json").read_text())["files"]
    assert sum(entry["bytes"] for entry in files.values()) < 1.1 * weights
    loaded = _run(LOADED, tmp_path / "x")
    # The sessions, arenas and code pages of a process that does nothing else take some 15 MB whatever the weights.
    assert loaded < 1.15 * weights + 15e6, loaded / weights


@pytest.mark.slow
def test_a_large_model_exports_within_its_memory(tmp_path: Path) -> None:
    """5 copies of the weights at most: 1e9 parameters, 4 GB, stay below 24 GiB (benchmarks/export_large.py)."""
    assert _run(EXPORTED, tmp_path / "x") < 5
