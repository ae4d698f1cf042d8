"""Decoding on one GPU: ms per token over batch, context and model, beside the time that moving its bytes takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MoMConfig
from ..decode import DecodeSession
from ..generate import PREFILL_TOKENS
from ..model import MoMForCausalLM
from ..ops import decode_step_
from ..state import State
from ..state_ops import fork_state
from .counts import state_bytes, weight_bytes
from .measure import copy_bandwidth, device_name, free, median_ms, versions
from .peers import load_peers, recorded
from .report import Table, plot_lines
from .sizes import size

COLUMNS = {
    "size": 0, "state": 0, "model": 26, "batch": 5, "context": 7, "ms_per_token": 12, "tokens_per_s": 12, "floor_ms": 8,
    "of_floor": 8, "times_ours": 10, "decode_step_us": 14, "decode_step_of_copy": 19, "copy_tb_s": 0, "note": 30,
}  # fmt: skip
OURS = "mom-compile"


class Options(NamedTuple):
    """What ``bench decode`` times on a GPU.

    Attributes:
        sizes: names of models in ``SIZES``.
        batches: sequences at once.
        contexts: tokens seen before the timed ones.
        state: dtype of the recurrent state.
        peers: folder of adapters or None.
        slow_peers: also time those that tune themselves for minutes.
        out: folder for decode.csv or None.
    """

    sizes: Sequence[str] = ("512m",)
    batches: Sequence[int] = (1, 16, 128)
    contexts: Sequence[int] = (2048, 32768, 131072)
    state: torch.dtype = torch.float32
    peers: Path | None = None
    slow_peers: bool = False
    out: Path | None = None


@torch.no_grad()
def bench_decode(options: Options, device: torch.device) -> Table:
    """Time decode sessions of bfloat16 models, then the peers; a row per model, batch and context.

    The floor is what a copy of the same bytes would take at the bandwidth measured in this run: the weights once, the
    states of the selected memories read and written once. ``times_ours`` is the time over ours of the same batch and
    context. Weights are random: no time here depends on their values.
    """
    bandwidth = copy_bandwidth(device)
    common = {"device": device_name(device), "versions": versions()}
    table = Table(COLUMNS, common, options.out and options.out / "decode.csv")
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in options.sizes:
        ours = _ours(table, name, options, device, bandwidth)
        free(device)
        for peer in load_peers(options.peers, "decoder"):
            if getattr(peer, "SLOW", False) and not options.slow_peers:
                print(f"{peer.NAME} tunes itself for minutes: recorded figures instead; --slow-peers times it")
                continue
            _peer(table, peer, name, options, device, bandwidth, ours)
            free(device)
        for row in recorded(options.peers, device, what="decode", size=name):
            batch, ms = int(row["batch"]), float(row["ms"])
            if batch in options.batches:
                first = ours[batch, options.contexts[0]]
                table.add(
                    size=name, model=row["model"], batch=batch, ms_per_token=ms, tokens_per_s=batch / ms * 1e3,
                    times_ours=ms / first, note=f"recorded {row['date']}, {row['versions']}",
                )  # fmt: skip
    return table


def _ours(
    table: Table, name: str, options: Options, device: torch.device, bandwidth: float
) -> dict[tuple[int, int], float]:
    config = size(name)
    torch.manual_seed(0)
    model = MoMForCausalLM(config).to(device, torch.bfloat16).eval()
    seen = _states(model, options.contexts, options.state, device)
    times: dict[tuple[int, int], float] = {}
    for batch in options.batches:
        states = state_bytes(config, batch, options.state)
        floor = (weight_bytes(model) + config.num_hidden_layers * states) / bandwidth * 1e3
        kernel = state_kernel_ms(config, batch, options.state, device)
        free(device)
        session = DecodeSession(model, batch, dtype=options.state)
        ids = torch.randint(0, config.vocab_size, (batch,), device=device)

        def token(session: DecodeSession = session, ids: Tensor = ids) -> None:
            ids.copy_(session.step(ids).argmax(-1))

        for context in options.contexts:
            session.load(fork_state(seen[context], batch))
            value = times[batch, context] = median_ms(token, device, inner=10)
            table.add(
                size=name, state=str(options.state).removeprefix("torch."), model=OURS, batch=batch, context=context,
                ms_per_token=value, tokens_per_s=batch / value * 1e3, floor_ms=floor, of_floor=floor / value,
                times_ours=1.0, decode_step_us=kernel * 1e3, decode_step_of_copy=states / bandwidth / kernel * 1e3,
                copy_tb_s=bandwidth / 1e12,
            )  # fmt: skip
        del session, token
        free(device)
    return times


def _states(
    model: MoMForCausalLM, contexts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[int, State]:
    """The state of one sequence after each number of random tokens."""
    state, seen, states = model.init_state(1, dtype=dtype), 0, {}
    for context in sorted(contexts):
        while seen < context:
            length = min(PREFILL_TOKENS, context - seen)
            state = model(torch.randint(0, model.config.vocab_size, (1, length), device=device), state=state).state
            seen += length
        states[context] = state
    return states


def _peer(
    table: Table,
    peer: object,
    name: str,
    options: Options,
    device: torch.device,
    bandwidth: float,
    ours: dict[tuple[int, int], float],
) -> None:
    decoder = peer.decoder(size(name), device, torch.bfloat16)  # type: ignore[attr-defined]
    for batch in options.batches:
        for context in options.contexts:
            row = {"size": name, "model": peer.NAME, "batch": batch, "context": context}  # type: ignore[attr-defined]
            free(device)  # what a context that did not fit had allocated is held until its error is gone
            try:
                step, moved = decoder(batch, context)
            except (MemoryError, torch.OutOfMemoryError) as error:
                table.add(**row, note=f"does not fit: {error}" if isinstance(error, MemoryError) else "does not fit")
                continue
            value, floor = median_ms(step, device), moved / bandwidth * 1e3
            table.add(
                **row, ms_per_token=value, tokens_per_s=batch / value * 1e3, floor_ms=floor, of_floor=floor / value,
                times_ours=value / ours[batch, context], copy_tb_s=bandwidth / 1e12,
                note=getattr(peer, "NOTE", None),
            )  # fmt: skip
            del step


def state_kernel_ms(config: MoMConfig, batch: int, dtype: torch.dtype, device: torch.device) -> float:
    """One layer's mom::decode_step_ as a CUDA graph, on states of several layers in turn so that none stays cached."""
    heads, dim, total = config.num_heads, config.head_dim, config.total_memories
    size, low = heads * dim, torch.bfloat16
    layers = max(min(config.num_hidden_layers, 2**35 // max(state_bytes(config, batch, dtype), 1)), 1)
    shape = (batch, total, config.value_heads, dim, config.value_dim)
    with device:
        states = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        window = torch.zeros(batch, total, config.conv_channels, config.conv_size - 1, dtype=low)
        q = torch.randn(batch, 1, size, dtype=low)
        kv = torch.randn(batch, 1, total, config.conv_channels - size, dtype=low)
        logits = torch.randn(batch, 1, config.num_memories)
        a, b = (torch.randn(batch, 1, total, config.value_heads) for _ in range(2))
        vector = torch.zeros(config.value_heads)
        taps = torch.randn(config.conv_channels, config.conv_size, dtype=low)

    def run() -> None:
        for state in states:
            decode_step_(
                q, kv, state, window, router_logits=logits, a=a, b=b, A_log=vector, dt_bias=vector, conv_weight=taps,
                topk=config.topk, shared=config.shared_mem,
            )  # fmt: skip

    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay, device) / layers


def plot_decode(table: Table, path: Path) -> bool:
    """ms per token against the context, a line per model and batch; whether it was drawn."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        if "context" in row and "ms_per_token" in row:
            label = f"{row['model']}, {row['size']}, batch {row['batch']}"
            lines.setdefault(label, []).append((row["context"], row["ms_per_token"]))
    return plot_lines(path, lines, "Decoding", "tokens of context", "ms per token")
