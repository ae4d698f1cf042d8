"""Decoding on one GPU: ms per token of a session over batch sizes, beside the time that moving its bytes takes.

    python benchmarks/decode.py [--out FOLDER] [--size 512m|tiny] [--batch 1 16 128] [--state float32] [--profile]

The floor is what a copy of the same bytes would take at the bandwidth measured in the same run: the weights once, the
states of the selected memories read and written once. With --out writes decode.csv there.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.decode import DecodeSession
from mom_compile.ops import decode_step_

SIZES = {
    "tiny": MoMConfig(vocab_size=257, hidden_size=128, num_hidden_layers=2, num_heads=2, head_dim=64, hidden_ratio=2),
    "512m": MoMConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=24, hidden_ratio=3, tie_word_embeddings=True
    ),
}
COPY_BYTES = 2**31


def median_ms(function: Callable[[], object], repeats: int = 20, inner: int = 1) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(lambda: target.copy_(source)) * 1e3


def state_bytes(config: MoMConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes of the states that one token of one layer reads and writes."""
    size = torch.empty(0, dtype=dtype).element_size()
    choices = config.topk + int(config.shared_mem)
    return 2 * batch * choices * config.value_heads * config.head_dim * config.value_dim * size


def weight_bytes(model: MoMForCausalLM) -> int:
    tied = model.config.tie_word_embeddings
    skipped = 0 if tied else model.model.embeddings.weight.numel() * model.model.embeddings.weight.element_size()
    return sum(p.numel() * p.element_size() for p in model.parameters()) - skipped


def state_kernel_ms(config: MoMConfig, batch: int, dtype: torch.dtype) -> float:
    """One layer's mom::decode_step_ as a CUDA graph, on states of several layers in turn so that none stays cached."""
    heads, dim, total = config.num_heads, config.head_dim, config.total_memories
    size = heads * dim
    layers = max(min(config.num_hidden_layers, 2**35 // max(state_bytes(config, batch, dtype), 1)), 1)
    states = [torch.zeros(batch, total, config.value_heads, dim, config.value_dim, dtype=dtype) for _ in range(layers)]
    window = torch.zeros(batch, total, config.conv_channels, config.conv_size - 1, dtype=torch.bfloat16)
    q = torch.randn(batch, 1, size, dtype=torch.bfloat16)
    kv = torch.randn(batch, 1, total, config.conv_channels - size, dtype=torch.bfloat16)
    logits = torch.randn(batch, 1, config.num_memories)
    a, b = (torch.randn(batch, 1, total, config.value_heads) for _ in range(2))
    vector = torch.zeros(config.value_heads)
    taps = torch.randn(config.conv_channels, config.conv_size, dtype=torch.bfloat16)

    def run() -> None:
        for state in states:
            decode_step_(
                q, kv, state, window, router_logits=logits, a=a, b=b, A_log=vector, dt_bias=vector, conv_weight=taps,
                topk=config.topk, shared=config.shared_mem,
            )  # fmt: skip

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay) / layers


def profile(session: DecodeSession, ids: torch.Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            session.step(ids)
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", default="512m", choices=SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--state", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    config, dtype = SIZES[args.size], getattr(torch, args.state)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {versions}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    model = MoMForCausalLM(config).bfloat16().eval()
    rows: list[dict[str, object]] = []
    for batch in args.batch:
        session = DecodeSession(model, batch, dtype=dtype)
        ids = torch.randint(0, config.vocab_size, (batch,))

        def token(session: DecodeSession = session, ids: torch.Tensor = ids) -> None:
            ids.copy_(session.step(ids).argmax(-1))

        value = median_ms(token, inner=10)
        if args.profile:
            profile(session, ids)
        del session, token
        torch.cuda.empty_cache()
        states = state_bytes(config, batch, dtype)
        kernel = state_kernel_ms(config, batch, dtype)
        floor = (weight_bytes(model) + config.num_hidden_layers * states) / bandwidth * 1e3
        row = {
            "device": torch.cuda.get_device_name(),
            "versions": versions,
            "size": args.size,
            "state": args.state,
            "batch": batch,
            "ms_per_token": round(value, 3),
            "tokens_per_s": round(batch / value * 1e3),
            "floor_ms": round(floor, 3),
            "of_floor": round(floor / value, 3),
            "decode_step_us": round(kernel * 1e3, 1),
            "decode_step_of_copy": round(states / bandwidth / kernel * 1e3, 3),
            "copy_tb_s": round(bandwidth / 1e12, 3),
        }
        rows.append(row)
        print({name: row[name] for name in list(row)[4:]}, flush=True)
    if args.out:
        with (args.out / "decode.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
