"""The model on one GPU: time and memory of training steps and of decode steps.

    python benchmarks/gpu_model.py [--out FOLDER] [--size 512m|tiny] [--memory auto|save|selective|block]

Prints a table; with --out writes gpu_model.csv there. Timings are medians over CUDA events after warm-up.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.memory_policy import MEMORY_POLICIES

SIZES = {
    "tiny": MoMConfig(vocab_size=257, hidden_size=128, num_hidden_layers=2, num_heads=2, head_dim=64, hidden_ratio=2),
    "512m": MoMConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=24, hidden_ratio=3, tie_word_embeddings=True
    ),
}
ROWS: list[dict[str, object]] = []


def record(what: str, value: object, unit: str) -> None:
    ROWS.append({"what": what, "value": value, "unit": unit})
    print(f"{what:<64} {value} {unit}", flush=True)


def median_ms(function: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def timings(size: str, memory: str) -> None:
    config = SIZES[size]
    torch.manual_seed(0)
    model = MoMForCausalLM(config).cuda().bfloat16()
    model.set_memory_policy(memory)
    record("memory policy", memory, "")
    record(f"{size}: parameters", round(sum(p.numel() for p in model.parameters()) / 1e6, 1), "M")
    for batch, length in [(8, 2048), (1, 16384)]:
        ids = torch.randint(0, config.vocab_size, (batch, length), device="cuda")

        def step(ids: torch.Tensor = ids) -> None:
            model(ids, labels=ids).loss.backward()
            model.zero_grad()

        torch.cuda.reset_peak_memory_stats()
        try:
            value = median_ms(step, 5, 2)
        except torch.cuda.OutOfMemoryError:
            record(f"{size}: eager forward + backward {batch}x{length}", "out of memory", "")
            continue
        record(f"{size}: eager forward + backward {batch}x{length}", round(value, 1), "ms")
        record(f"{size}: peak memory {batch}x{length}", round(torch.cuda.max_memory_allocated() / 2**30, 1), "GiB")
    for block in model.model.layers:
        block.compile(fullgraph=True)
    ids = torch.randint(0, config.vocab_size, (8, 2048), device="cuda")
    start = time.perf_counter()
    step(ids)
    torch.cuda.synchronize()
    record(f"{size}: first step with the blocks compiled", round(time.perf_counter() - start, 1), "s")
    torch.cuda.reset_peak_memory_stats()
    record(f"{size}: compiled forward + backward 8x2048", round(median_ms(lambda: step(ids), 5, 2), 1), "ms")
    record(f"{size}: peak memory of it", round(torch.cuda.max_memory_allocated() / 2**30, 1), "GiB")
    model = MoMForCausalLM(config).cuda().bfloat16()
    with torch.no_grad():
        for batch in (1, 16):
            state = model.init_state(batch)
            ids = torch.randint(0, config.vocab_size, (batch, 1), device="cuda")
            value = median_ms(lambda state=state, ids=ids: model(ids, state=state), 10, 3)
            record(f"{size}: eager functional decode, batch {batch}", round(value, 2), "ms/token")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(ids, state=state)
            value = median_ms(graph.replay, 20, 3)
            record(f"{size}: the same as a CUDA graph, batch {batch}", round(value, 2), "ms/token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", default="512m", choices=SIZES)
    parser.add_argument("--memory", default="auto", choices=MEMORY_POLICIES)
    args = parser.parse_args()
    record("device", torch.cuda.get_device_name(), "")
    record(
        "versions", f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}", ""
    )
    timings(args.size, args.memory)
    if args.out:
        with (args.out / "gpu_model.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["what", "value", "unit"])
            writer.writeheader()
            writer.writerows(ROWS)


if __name__ == "__main__":
    main()
