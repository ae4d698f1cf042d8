"""Time of every operator, forward and backward, beside the time its bytes and its FLOP need at this run's ceilings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import RULES
from ..ops.memory_rule import chunk_rows
from .counts import tensor_bytes
from .measure import copy_bandwidth, device_name, free, matmul_ceiling, median_ms, versions
from .peers import load_peers
from .report import Table

COLUMNS = {
    "size": 0, "operator": 44, "direction": 10, "ms": 9, "gb_s": 8, "of_copy": 8, "tflop_s": 8, "of_matmul": 9,
    "times_ours": 10, "note": 30,
}  # fmt: skip


class Shape(NamedTuple):
    """One layer's sizes."""

    batch: int
    length: int
    hidden: int
    heads: int
    dim: int
    dtype: torch.dtype


SHAPES = {
    "512m": Shape(8, 2048, 1024, 4, 256, torch.bfloat16),
    "small": Shape(4, 512, 256, 4, 64, torch.float32),
    "tiny": Shape(2, 64, 32, 2, 16, torch.float32),
}
MEMORIES, TOPK, WIDTH = 4, 2, 4
RULE_SHAPES = ((4, 256), (8, 128))
RULE_LENGTH = 16384


class Case(NamedTuple):
    """An operator: a function, its inputs (floating ones get gradients) and the FLOP of one call."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    flops: float = 0.0


def bench_operators(
    name: str, rule: str, device: torch.device, repeats: int = 20, peers: Path | None = None, path: Path | None = None
) -> Table:
    """Time the operators of one layer, then the gated delta rule beside the peers' that have it.

    "bytes" counts each input read once and each output written once, so ``of_copy`` is the share of the copy bandwidth
    an operator would reach if it moved no more than that; a backward counts twice the bytes and the FLOP. On a GPU ten
    calls behind one another are one measurement.

    Args:
        name: of sizes in ``SHAPES``.
        rule: of ``RULES``.
        device: where.
        repeats: measurements a median is over.
        peers: folder of adapters; None: none is timed.
        path: CSV to write or None.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"size must be one of {', '.join(SHAPES)}, got {name!r}; choose one of them")
    shape = SHAPES[name]
    table = Table(COLUMNS, {"device": device_name(device), "versions": versions()}, path)
    bandwidth, ceiling = copy_bandwidth(device), matmul_ceiling(device, shape.dtype)
    table.add(size=name, operator="copy", gb_s=bandwidth / 1e9, of_copy=1.0)
    table.add(size=name, operator=f"matrix product, {shape.dtype}", tflop_s=ceiling / 1e12, of_matmul=1.0)

    def add(operator: str, direction: str, ms: float, moved: float, flops: float) -> None:
        seconds = ms / 1e3
        table.add(
            size=name, operator=operator, direction=direction, ms=ms, gb_s=moved / seconds / 1e9,
            of_copy=moved / seconds / bandwidth, tflop_s=flops / seconds / 1e12 if flops else None,
            of_matmul=flops / seconds / ceiling if flops else None,
        )  # fmt: skip

    for operator, (function, inputs, flops) in cases(shape, rule, device).items():
        in_place = operator.startswith("recurrent")
        leaves = [x.detach().requires_grad_(x.is_floating_point() and not in_place) for x in inputs]
        out = function(*leaves)
        moved = tensor_bytes([*inputs, out]) + (tensor_bytes(inputs[:1]) if in_place else 0)
        with torch.no_grad():
            add(operator, "forward", _ms(lambda: function(*leaves), device, repeats), moved, flops)  # noqa: B023
        if out.requires_grad:
            add(operator, "backward", _backward_ms(out, leaves, device, repeats), 2 * moved, 2 * flops)
    if peers is not None:
        length, shapes = (RULE_LENGTH, RULE_SHAPES) if name == "512m" else (shape.length, ((shape.heads, shape.dim),))
        compare_rule(table, peers, device, shape.dtype, length, shapes, repeats)
    return table


def compare_rule(
    table: Table,
    peers: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    shapes: tuple[tuple[int, int], ...],
    repeats: int,
) -> None:
    """chunk_gated_delta_rule on one sequence, ours and each peer's in the same run."""
    functions: dict[str, Callable[..., Tensor]] = {"ours": lambda *x: ops.chunk_gated_delta_rule(*x)[0]}
    notes = {}
    for peer in load_peers(peers, "chunk_gated_delta_rule"):
        functions[peer.NAME] = peer.chunk_gated_delta_rule
        notes[peer.NAME] = peer.unguarded() if hasattr(peer, "unguarded") else ""
    for heads, dim in shapes:
        size = (1, length, heads, dim)
        q, k, v = (torch.randn(size, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        q, k = (ops.l2_norm(x.detach()).requires_grad_() for x in (q, k))
        g = (-torch.rand(size[:3], device=device)).requires_grad_()
        beta = torch.rand(size[:3], device=device, dtype=dtype).requires_grad_()
        leaves = [q, k, v, g, beta]
        ours: dict[str, float] = {}
        for name, function in functions.items():
            operator = f"{name} chunk_gated_delta_rule H={heads} K=V={dim} T={length}"
            try:
                with torch.no_grad():
                    forward = _ms(lambda: function(*leaves), device, repeats)  # noqa: B023
                backward = _backward_ms(function(*leaves), leaves, device, repeats)
            except Exception as error:  # a peer may refuse this device or these versions
                if name == "ours":
                    raise
                table.add(operator=operator, note=f"refused: {str(error)[:120]}")
                continue
            for direction, ms in (("forward", forward), ("backward", backward)):
                base = ours.setdefault(direction, ms)
                table.add(
                    operator=operator, direction=direction, ms=ms, times_ours=ms / base,
                    note=notes.get(name) or None if direction == "backward" else None,
                )  # fmt: skip
        free(device)


def _backward_ms(out: Tensor, leaves: list[Tensor], device: torch.device, repeats: int) -> float:
    grad = torch.randn_like(out)
    wanted = [x for x in leaves if x.requires_grad]
    return _ms(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True), device, repeats)


def _ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Calls behind one another, as in a step: an idle GPU would wait for the CPU before the first kernel of each."""
    return median_ms(call, device, repeats, inner=10 if device.type == "cuda" else 1)


def cases(shape: Shape, rule: str, device: torch.device) -> dict[str, Case]:
    """The operators of a layer of that shape, on rows that its plan laid out."""
    heads, dim, hidden = shape.heads, shape.dim, shape.hidden
    tokens = shape.batch * shape.length
    torch.manual_seed(0)

    def make(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    logits = make(tokens, MEMORIES, dtype=torch.float32)
    bounds = torch.arange(shape.batch + 1, device=device) * shape.length
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
    beta = torch.rand(rows, heads, device=device, dtype=shape.dtype) * real[..., 0] if RULES[rule].delta else None
    used = tokens * (TOPK + 1)

    def memory_rule(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        values = list(rest)
        gate = values.pop(0) if g is not None else None
        rate = values.pop(0) if beta is not None else None
        return chunk_rows(rule, q, k, v, gate, rate, dim**-0.5, None, plan.segments)[0]

    return {
        "route": Case(lambda x: ops.route(x, TOPK)[0], [logits]),
        "dispatch": Case(lambda x: ops.dispatch(x, bounds, MEMORIES, shared=True).entry_of, [indices]),
        "permute": Case(lambda x: ops.permute(x, plan), [make(tokens, hidden)]),
        "grouped_linear": Case(
            lambda x, w: ops.grouped_linear(x, w, plan.group_offset),
            [make(rows, hidden), make(MEMORIES + 1, 2 * heads * dim, hidden)],
            2.0 * used * hidden * 2 * heads * dim,
        ),
        "short_conv": Case(
            lambda x, w: torch.ops.mom.short_conv(x, w, None, *plan.segments, "silu")[0],
            [make(rows, channels), make(channels, WIDTH)],
        ),
        f"chunk {rule}": Case(
            memory_rule,
            [q, k, v, *(x for x in (g, beta) if x is not None)],
            (6.0 if RULES[rule].delta else 4.0) * used * heads * dim * dim,
        ),
        "combine": Case(
            lambda o, w: ops.combine(o, w, plan),
            [make(rows, heads, dim), torch.rand(tokens, TOPK, device=device)],
        ),
        "gated_rms_norm": Case(
            lambda x, gate, w: ops.gated_rms_norm(x, gate, w),
            [make(tokens, heads, dim), make(tokens, heads, dim), make(dim)],
        ),
        f"recurrent {rule}": _decode(rule, shape, device),
    }


def _decode(rule: str, shape: Shape, device: torch.device) -> Case:
    """One token of 128 sequences, three memories each, in place."""
    function = getattr(ops, f"recurrent_{RULES[rule].op}_")
    count, heads, dim = 128 * (TOPK + 1), shape.heads, shape.dim
    inputs = [torch.randn(count, 1, heads, dim, device=device, dtype=shape.dtype) for _ in range(3)]
    if RULES[rule].gate == "scalar":
        inputs.append(-torch.rand(count, 1, heads, device=device))
    if RULES[rule].gate == "head":
        inputs.append(-torch.rand(heads, device=device))
    if RULES[rule].delta:
        inputs.append(torch.rand(count, 1, heads, device=device, dtype=shape.dtype))
    state = torch.zeros(count, heads, dim, dim, device=device)

    def step(state: Tensor, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*inputs, state=state)

    return Case(step, [state, *inputs])
