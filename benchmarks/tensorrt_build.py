"""Engines of TensorRT for RTX from models of random weights, with no GPU: seconds, bytes and peak memory of a stage.

    python benchmarks/tensorrt_build.py [--model 512M 1B] [--precision float16] [--compute-capability 89] [--out F.csv]

The graphs are written by one process and every engine is built by a process of its own, so that each peak is that of
one stage. The graphs are not verified here: ``mom-compile export --to tensorrt`` does that.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 2, "head_dim": 128, "vocab_size": 4096},
    "512M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "head_dim": 256, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 12, "num_heads": 8, "head_dim": 256, "vocab_size": 32000},
}
COMMON = {"num_memories": 4, "topk": 2, "shared_mem": True, "hidden_ratio": 3, "tie_word_embeddings": True}
COLUMNS = ("model", "precision", "compute_capabilities", "stage", "parameters", "seconds", "MB", "peak_GiB", "versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["512M", "1B"])
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--compute-capability", type=int, nargs="+", default=[89])
    parser.add_argument("--out", help="CSV to append to")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run_stage(args)
        return
    rows = []
    for name in args.model:
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("graphs", "decode", "prefill"):
                options = ["--model", name, "--precision", args.precision, "--folder", folder, "--stage", stage]
                options += ["--compute-capability", *map(str, args.compute_capability)]
                child = subprocess.run(
                    [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
                )
                rows.append(json.loads(child.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    if args.out:
        with Path(args.out).open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)


def run_stage(args: argparse.Namespace) -> None:
    """One stage in this process; prints its row."""
    from mom_compile import MoMConfig
    from mom_compile.export._tensorrt import require_tensorrt
    from mom_compile.export.budget import parameters

    config = MoMConfig(**{**COMMON, **MODELS[args.model[0]]})
    folder, versions = Path(args.folder), [f"python {platform.python_version()}"]
    start = time.perf_counter()
    if args.stage == "graphs":
        import torch

        from mom_compile import MoMForCausalLM
        from mom_compile.export.tensorrt_artifact import engine_graphs, write_graphs

        torch.manual_seed(0)
        io = write_graphs(MoMForCausalLM(config).eval(), folder, args.precision, engine_graphs(config))
        (folder / "io.json").write_text(json.dumps(io))
        size = (folder / "weights.bin").stat().st_size
        versions.append(f"torch {torch.__version__}")
    else:
        from mom_compile.export.tensorrt_engines import build_engine
        from mom_compile.export.tensorrt_shapes import ShapeRanges

        inputs = json.loads((folder / "io.json").read_text())[args.stage]["inputs"]
        graph, engine = folder / f"{args.stage}.onnx", folder / f"{args.stage}.engine"
        built = build_engine(graph, engine, ShapeRanges().shapes(inputs), args.compute_capability)
        size = built["bytes"]
        engine.unlink()
        versions.append(f"TensorRT for RTX {require_tensorrt().__version__}")
    seconds = time.perf_counter() - start
    row = {
        "model": args.model[0],
        "precision": args.precision,
        "compute_capabilities": " ".join(map(str, args.compute_capability)),
        "stage": args.stage,
        "parameters": sum(parameters(config).values()),
        "seconds": round(seconds, 1),
        "MB": round(size / 1e6, 1),
        "peak_GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "versions": ", ".join(versions),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
