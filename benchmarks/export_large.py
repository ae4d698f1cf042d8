"""Export of a large model with random weights: peak memory, sizes and seconds of each part.

    python benchmarks/export_large.py [--hidden 2048] [--layers 12] [--heads 8] [--dim 256] [--vocab 32000] [--out DIR]

The default has 1.1e9 parameters. The artifact is verified as every export is; that reads the weights some 500 times.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from mom_compile import MoMConfig, MoMForCausalLM, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("layers", 12), ("heads", 8), ("dim", 256), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", help="keep the artifact here")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = MoMConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_heads=args.heads,
        head_dim=args.dim,
    )
    model = MoMForCausalLM(config).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights // 4:,} parameters, {weights / 2**30:.2f} GiB", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.out or scratch) / "artifact"
        begin = time.perf_counter()
        report = export.to_onnx(model, folder)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(report)
    print(f"{seconds:.0f} s, peak {peak:.1f} GiB, on disk {size / weights:.3f} of the weights")


if __name__ == "__main__":
    main()
