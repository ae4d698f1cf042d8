"""Decode step of one layer in onnxruntime on the CPU: whole state, one shared buffer, touched memories alone.

    python benchmarks/touched_decode.py [--hidden 256] [--heads 16] [--dim 128] [--memories 8] [--topk 2] [--batch 1]

The artifact has one layer and a vocabulary of 257; with a small --hidden the states outweigh the projections, which all
three read whole. Medians of one run; read only the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mom_compile import MoMConfig, MoMForCausalLM, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 256), ("heads", 16), ("dim", 128), ("memories", 8), ("topk", 2), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = MoMForCausalLM(
        MoMConfig(
            vocab_size=257,
            hidden_size=args.hidden,
            num_hidden_layers=1,
            num_heads=args.heads,
            head_dim=args.dim,
            num_memories=args.memories,
            topk=args.topk,
            intermediate_size=args.hidden,
        )
    ).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    states = sum(4 * value.numel() for value in model.init_state(args.batch)[0].values())
    print(f"batch {args.batch}, weights {weights / 1e6:.1f} MB, states {states / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        export.to_onnx(model, Path(folder) / "x")
        runner = export.load(Path(folder) / "x")
        ids = np.random.default_rng(0).integers(0, 257, (args.batch, args.steps))
        _, state = runner(ids[:, :8])
        times = {}
        ways = {"whole": {"touched": False}, "one buffer": {"aliased": True}, "touched": {"touched": True}}
        for name, options in ways.items():
            step = runner.decode_loop(state, args.batch, **options)
            taken = []
            for t in range(args.steps):
                begin = time.perf_counter()
                step(ids[:, t])
                taken.append((time.perf_counter() - begin) * 1e3)
            times[name] = sorted(taken)[len(taken) // 2]
        for name, value in times.items():
            print(f"{name:<12}{value:8.3f} ms  {times['whole'] / value:5.2f}x")


if __name__ == "__main__":
    main()
