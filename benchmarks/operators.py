"""Time of every operator, forward and backward, beside the time its bytes need at the copy bandwidth of the same run.

    python benchmarks/operators.py [--device cuda|cpu] [--size 512m|small] [--rule gated_delta] [--out FOLDER]

The shapes are those of one layer. "bytes" counts each input read once and each output written once, so "of copy" is
the share of the copy bandwidth an operator would reach if it moved no more than that. Medians; on a shared CPU read
only the ratios. --peer times flash-linear-attention's chunk_gated_delta_rule in the same run.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import mom_compile.ops as ops
from mom_compile.ops import RULES
from mom_compile.ops.memory_rule import chunk_rows

SIZES = {
    "512m": {"batch": 8, "length": 2048, "hidden": 1024, "heads": 4, "dim": 256, "dtype": torch.bfloat16},
    "small": {"batch": 4, "length": 512, "hidden": 256, "heads": 4, "dim": 64, "dtype": torch.float32},
}
MEMORIES, TOPK, WIDTH = 4, 2, 4
Row = dict[str, object]


def median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    function()
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per ms, read and written ones counted."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source, target = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    return 2 * size / median_ms(lambda: target.copy_(source), device, 10)


def cases(size: str, rule: str, device: torch.device) -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Name -> (function, its inputs); floating inputs get gradients."""
    options = SIZES[size]
    batch, length, heads, dim = (int(options[name]) for name in ("batch", "length", "heads", "dim"))  # type: ignore[call-overload]
    hidden, dtype = int(options["hidden"]), options["dtype"]  # type: ignore[call-overload]
    tokens = batch * length
    torch.manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:  # type: ignore[assignment]
        return torch.randn(*shape, device=device, dtype=dtype)

    logits = make(tokens, MEMORIES, dtype=torch.float32)
    bounds = torch.arange(batch + 1, device=device) * length
    _, indices = ops.route(logits, TOPK)
    plan = ops.dispatch(indices, bounds, MEMORIES, shared=True)
    rows = plan.entry_of.shape[0]
    real = (plan.entry_of >= 0).view(-1, 1, 1)
    channels = 3 * heads * dim
    q, k, v = (make(rows, heads, dim) * real for _ in range(3))
    q, k = ops.l2_norm(q), ops.l2_norm(k)
    g = -torch.rand(rows, heads, device=device) * real[..., 0] if RULES[rule].gate == "scalar" else None
    if RULES[rule].gate == "head":
        g = -torch.rand(heads, device=device)
    beta = torch.rand(rows, heads, device=device, dtype=dtype) * real[..., 0] if RULES[rule].delta else None  # type: ignore[arg-type]
    extra = [x for x in (g, beta) if x is not None]

    def memory_rule(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        values = list(rest)
        gate = values.pop(0) if g is not None else None
        return chunk_rows(rule, q, k, v, gate, values.pop(0) if beta is not None else None, dim**-0.5, None, plan)[0]

    return {
        "route": (lambda x: ops.route(x, TOPK)[0], [logits]),
        "dispatch": (lambda x: ops.dispatch(x, bounds, MEMORIES, shared=True).entry_of, [indices]),
        "permute": (lambda x: ops.permute(x, plan), [make(tokens, hidden)]),
        "grouped_linear": (
            lambda x, w: ops.grouped_linear(x, w, plan.group_offset),
            [make(rows, hidden), make(MEMORIES + 1, 2 * heads * dim, hidden)],
        ),
        "short_conv": (
            lambda x, w: torch.ops.mom.short_conv(x, w, None, *plan.segments, "silu")[0],
            [make(rows, channels), make(channels, WIDTH)],
        ),
        f"chunk {rule}": (memory_rule, [q, k, v, *extra]),
        "combine": (
            lambda o, w: ops.combine(o, w, plan),
            [make(rows, heads, dim), torch.rand(tokens, TOPK, device=device)],
        ),
        "gated_rms_norm": (
            lambda x, gate, w: ops.gated_rms_norm(x, gate, w),
            [make(tokens, heads, dim), make(tokens, heads, dim), make(dim)],
        ),
        f"recurrent {rule}": _decode(rule, heads, dim, dtype, device),  # type: ignore[arg-type]
    }


def _decode(
    rule: str, heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., object], list[Tensor]]:
    """One token of 128 sequences, three memories each, in place."""
    function = getattr(ops, f"recurrent_{RULES[rule].op}_")
    count = 128 * (TOPK + 1)
    inputs = [torch.randn(count, 1, heads, dim, device=device, dtype=dtype) for _ in range(3)]
    if RULES[rule].gate == "scalar":
        inputs.append(-torch.rand(count, 1, heads, device=device))
    if RULES[rule].gate == "head":
        inputs.append(-torch.rand(heads, device=device))
    if RULES[rule].delta:
        inputs.append(torch.rand(count, 1, heads, device=device, dtype=dtype))
    state = torch.zeros(count, heads, dim, dim, device=device)

    def step(state: Tensor, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*inputs, state=state)

    return step, [state, *inputs]


def bytes_of(*tensors: object) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def measure(size: str, rule: str, device: torch.device, repeats: int) -> Iterator[Row]:
    bandwidth = copy_bandwidth(device)
    yield {"operator": "copy", "GB/s": round(bandwidth / 1e6, 1), "of copy": 1.0}

    def row(name: str, direction: str, ms: float, moved: int) -> Row:
        share = moved / bandwidth / ms
        return {
            "operator": name,
            "direction": direction,
            "ms": round(ms, 4),
            "GB/s": round(moved / ms / 1e6, 1),
            "of copy": round(share, 3),
        }

    for name, (function, inputs) in cases(size, rule, device).items():
        in_place = name.startswith("recurrent")
        leaves = [x.detach().requires_grad_(x.is_floating_point() and not in_place) for x in inputs]
        out = function(*leaves)
        moved = bytes_of(*inputs, out) + (bytes_of(inputs[0]) if in_place else 0)
        with torch.no_grad():
            yield row(name, "forward", median_ms(lambda: function(*leaves), device, repeats), moved)  # noqa: B023
        if isinstance(out, Tensor) and out.requires_grad:
            grad = torch.randn_like(out)
            wanted = [x for x in leaves if x.requires_grad]

            def backward() -> object:
                return torch.autograd.grad(out, wanted, grad, retain_graph=True)  # noqa: B023

            yield row(name, "backward", median_ms(backward, device, repeats), 2 * moved)


def peer(device: torch.device, repeats: int) -> Iterator[Row]:
    """flash-linear-attention's chunk_gated_delta_rule on T = 16384 tokens of one sequence, and ours beside it."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    for heads, dim in ((4, 256), (8, 128)):
        shape = (1, 16384, heads, dim)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        q, k = (ops.l2_norm(x.detach()).requires_grad_() for x in (q, k))
        g = (-torch.rand(shape[:3], device=device)).requires_grad_()
        beta = torch.rand(shape[:3], device=device, dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn_like(v)
        for name, function in (("ours", ops.chunk_gated_delta_rule), ("fla", theirs)):
            label = f"{name} chunk_gated_delta_rule H={heads} K=V={dim} T=16384"
            try:
                out = function(q, k, v, g, beta)[0]
                with torch.no_grad():
                    ms = median_ms(lambda: function(q, k, v, g, beta), device, repeats)  # noqa: B023
                yield {"operator": label, "direction": "forward", "ms": round(ms, 4)}
                wanted = [q, k, v, g, beta]
                ms = median_ms(
                    lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True),  # noqa: B023
                    device,
                    repeats,
                )
                yield {"operator": label, "direction": "backward", "ms": round(ms, 4)}
            except Exception as error:  # its backward refuses some versions of Triton
                yield {"operator": label, "direction": f"refused: {str(error)[:80]}"}


def _line(row: Row) -> str:
    widths = {"operator": 52, "direction": 10, "ms": 9, "GB/s": 8, "of copy": 8}
    return "  ".join(f"{row.get(column, '')!s:<{width}}" for column, width in widths.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rule", choices=RULES, default="gated_delta")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--peer", action="store_true", help="time fla's operator too; it tunes itself for minutes first"
    )
    parser.add_argument("--out", type=Path, help="folder for operators.csv")
    args = parser.parse_args()
    device = torch.device(args.device)
    size = args.size or ("512m" if device.type == "cuda" else "small")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, python {platform.python_version()}; size {size}, rule {args.rule}")
    table: list[Row] = []
    columns = ["operator", "direction", "ms", "GB/s", "of copy"]
    print(_line({column: column for column in columns}))
    rows = measure(size, args.rule, device, args.repeats)
    for row in chain(rows, peer(device, args.repeats)) if args.peer else rows:
        table.append(row)
        print(_line(row), flush=True)
    if args.out:
        with (args.out / "operators.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
