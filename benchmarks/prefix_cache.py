"""Time to the first token of a question behind a long prefix: read whole, and continued from the prefix's saved state.

    python benchmarks/prefix_cache.py [--prefix 2048] [--question 16] [--size tiny|512m]

Prints the medians and their ratio; on a CPU only the ratio means something. The state has one size, whatever
the prefix's length, so the gain grows with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode import SIZES

from mom_compile import MoMForCausalLM, load_state, save_state


def median_ms(function: Callable[[], object], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[repeats // 2]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--question", type=int, default=16)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = MoMForCausalLM(SIZES[args.size]).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, args.prefix + args.question), device=device)
    prefix, question = ids[:, : args.prefix], ids[:, args.prefix :]
    state = model(prefix).state
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefix.safetensors"
        save_state(state, file, model.config)
        size = file.stat().st_size
        whole = median_ms(lambda: model.generate(ids, 1, eos_token_id=-1), device)
        held = median_ms(lambda: model.generate(question, 1, state=state, eos_token_id=-1), device)
        loaded = median_ms(
            lambda: model.generate(question, 1, state=load_state(file, model.config, device), eos_token_id=-1), device
        )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.size}: prefix {args.prefix}, question {args.question} tokens")
    print(f"whole text {whole:.2f} ms; state in memory {held:.2f} ms, {whole / held:.1f}x sooner; ", end="")
    print(f"state from a file of {size / 1e6:.1f} MB {loaded:.2f} ms, {whole / loaded:.1f}x sooner")


if __name__ == "__main__":
    main()
