"""The model on one GPU: parity with the CPU in float64, no host syncs, no graph breaks, first timings.

    python benchmarks/gpu_model.py [--out FOLDER] [--size 512m|tiny]

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
from mom_compile.ops import RULES

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


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


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


def parity() -> None:
    """Every rule: outputs, states and gradients of the GPU in float32 against the CPU in float64."""
    for rule in RULES:
        torch.manual_seed(0)
        config = MoMConfig(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=1,
            num_heads=2,
            head_dim=32,
            update_rule=rule,
        )
        exact = MoMForCausalLM(config).double()
        model = MoMForCausalLM(config)
        model.load_state_dict({k: v.float() for k, v in exact.state_dict().items()})
        model.cuda()
        ids = torch.randint(0, 97, (3, 200))
        mask = torch.ones(3, 200, dtype=torch.int64)
        mask[0, :17] = 0
        expected = exact(ids, attention_mask=mask, labels=ids, return_logits=True)
        indices = [logits.topk(2).indices for logits in expected.router_logits]
        out = model(
            ids.cuda(), attention_mask=mask.cuda(), labels=ids.cuda(), return_logits=True,
            router_indices=[i.cuda() for i in indices],
        )  # fmt: skip
        expected.loss.backward()
        out.loss.backward()
        worst = max(
            relative(p.grad, dict(exact.named_parameters())[n].grad)
            for n, p in model.named_parameters()
            if p.grad is not None and p.grad.any()
        )
        record(
            f"{rule}: logits, GPU float32 against CPU float64", f"{relative(out.logits, expected.logits):.1e}", "rel"
        )
        error = relative(out.state[0]["recurrent_state"], expected.state[0]["recurrent_state"])
        record(f"{rule}: state", f"{error:.1e}", "rel")
        record(f"{rule}: worst gradient", f"{worst:.1e}", "rel")
        with torch.no_grad():
            state = model(ids[:, :150].cuda()).state
            whole = model(ids.cuda()).logits
            for t in range(150, 158):
                step = model(ids[:, t : t + 1].cuda(), state=state)
                state = step.state
            record(f"{rule}: decode after prefill", f"{relative(step.logits[:, 0], whole[:, 157]):.1e}", "rel")


def syncs() -> None:
    """Nothing in a training step or a decode step waits for the device."""
    model = MoMForCausalLM(SIZES["tiny"]).cuda()
    ids = torch.randint(0, 257, (2, 300), device="cuda")
    model(ids, labels=ids).loss.backward()  # kernels compile here
    state = model(ids).state
    model(ids[:, :1], state=state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=ids).loss.backward()
        model(ids[:, :1], state=state)
        record("host syncs in forward, backward and decode", 0, "")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled() -> None:
    """torch.compile: graphs, graph breaks, parity, reduce-overhead decode."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = MoMForCausalLM(SIZES["tiny"]).cuda()
    fast = torch.compile(model, fullgraph=True)
    start = time.perf_counter()
    for batch, length in [(2, 100), (3, 130), (2, 257), (4, 64), (1, 511)]:
        ids = torch.randint(0, 257, (batch, length), device="cuda")
        loss = fast(ids, labels=ids).loss
        loss.backward()
        error = abs(loss.item() - model(ids, labels=ids).loss.item())
    record("compiled training: graphs for five shapes", counters["stats"]["unique_graphs"], "")
    record("compiled training: last loss difference", f"{error:.1e}", "nats")
    record("compiled training: five shapes took", f"{time.perf_counter() - start:.1f}", "s")
    with torch.no_grad():
        decode = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        ids = torch.randint(0, 257, (2, 120), device="cuda")
        expected = model(ids).logits
        state = model(ids[:, :20]).state
        worst = 0.0
        for t in range(20, 120):
            out = decode(ids[:, t : t + 1], state=state)
            state = tuple({k: v.clone() for k, v in layer.items()} for layer in out.state)
            worst = max(worst, relative(out.logits[:, 0], expected[:, t]))
        record("reduce-overhead decode, 100 steps: worst logits", f"{worst:.1e}", "rel")


def timings(size: str) -> None:
    config = SIZES[size]
    torch.manual_seed(0)
    model = MoMForCausalLM(config).cuda().bfloat16()
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
        record(f"{size}: peak memory", round(torch.cuda.max_memory_allocated() / 2**30, 1), "GiB")
    with torch.no_grad():
        for batch in (1, 16):
            state = model.init_state(batch)
            ids = torch.randint(0, config.vocab_size, (batch, 1), device="cuda")
            value = median_ms(lambda state=state, ids=ids: model(ids, state=state), 10, 3)
            record(f"{size}: eager functional decode, batch {batch}", round(value, 2), "ms/token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", default="512m", choices=SIZES)
    parser.add_argument("--parts", nargs="+", default=["parity", "syncs", "compiled", "timings"])
    args = parser.parse_args()
    record("device", torch.cuda.get_device_name(), "")
    record(
        "versions", f"torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}", ""
    )
    for part in args.parts:
        try:
            timings(args.size) if part == "timings" else globals()[part]()
        except Exception as error:  # a failed part must not cost the others their run
            record(f"{part} failed", f"{type(error).__name__}: {str(error)[:300]}", "")
    if args.out:
        with (args.out / "gpu_model.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["what", "value", "unit"])
            writer.writeheader()
            writer.writerows(ROWS)


if __name__ == "__main__":
    main()
