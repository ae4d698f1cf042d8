"""Export of a large model with random weights: peak memory, sizes and seconds of each part.

    python benchmarks/export_large.py [--hidden 2048] [--layers 12] [--heads 8] [--dim 256] [--vocab 32000] [--out DIR]

The default has 1.2e9 parameters. The artifact is verified as every export is; that reads the weights some 500 times.
Peak memory is the proportional set size: every session maps the one weights file, which the resident size counts again
for each of them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch

from mom_compile import MoMConfig, MoMForCausalLM, export


def watch_memory(peak: list[float], done: threading.Event) -> None:
    """Keep the largest proportional set size of this process in GiB, looked at twice a second (Linux)."""
    while not done.wait(0.5):
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        peak[0] = max(peak[0], kib / 2**20)


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
    peak, done = [0.0], threading.Event()
    threading.Thread(target=watch_memory, args=(peak, done), daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.out or scratch) / "artifact"
        begin = time.perf_counter()
        report = export.to_onnx(model, folder)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in folder.iterdir())
    done.set()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(report)
    print(
        f"{seconds:.0f} s, peak {peak[0]:.1f} GiB ({resident:.1f} with every mapping counted), "
        f"on disk {size / weights:.3f} of the weights"
    )


if __name__ == "__main__":
    main()
