"""Launches of the Triton kernels, and the configurations that they use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._kernel_variant import SHARED_MEMORY_KB, KernelVariant
from .._launch import (
    KERNEL_DTYPES,
    Config,
    cdiv,
    first_device,
    fork,
    join,
    launch,
    launches_run,
    next_power_of_2,
    pointer,
    remembered,
    shared_memory_kb,
    variant,
)
from .._layout import CHUNK
from .._triton import INTERPRET
from .kernels_bwd import chunk_bwd_kernel, chunk_pairs_bwd_kernel, chunk_scan_bwd_kernel
from .kernels_fwd import chunk_out_kernel, chunk_pairs_kernel, chunk_scan_kernel, scan_tables_kernel
from .kernels_pieces import chunk_join_kernel, chunk_piece_kernel, chunk_transition_kernel
from .kernels_recurrent import recurrent_kernel
from .rules import SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW

LARGE_KB = 200
"""Shared memory from which the kernels take larger blocks and more stages."""
PROCESSORS = 132
"""Thread blocks that the scans aim at: fewer leave processors idle, and each step waits for the one before."""
MANY = 1 << 20
PIECE = 32
"""Chunks of a piece, where a long segment is scanned in several at once."""
FENCED = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) >= (3, 7, 1)
"""Whether Triton puts the proxy fence between pipelined loads and the products of sm_90 that read them."""


class _Heads(NamedTuple):
    """What a launch depends on besides the sizes of the batch."""

    H: int
    HV: int
    K: int
    V: int
    dtype: torch.dtype
    gate: bool
    delta: bool


@remembered
def _config(kernel: Any, heads: _Heads, shared_kb: int, chains: int = MANY) -> tuple[Config, int]:
    """A kernel's configuration for thread blocks of ``shared_kb`` KiB of shared memory, and its blocks: the programs of
    one chain or chunk.

    ``chains``: segments times heads, of which the scans take blocks of the state; the fewer, the smaller (a sum does
    not depend on its block).

    More than one stage needs a proxy fence before each product of two plain loads: FENCE. The scans' products have a
    computed operand, or follow one that has, and so the fence; all but those of the additive rule without a gate.
    """
    key, value = next_power_of_2(max(heads.K, 16)), next_power_of_2(max(heads.V, 16))
    constants: dict[str, Any] = {"H": heads.H, "HV": heads.HV, "K": heads.K, "HAS_GATE": heads.gate}
    if kernel is recurrent_kernel:
        bv = min(value, 32)
        constants |= {"V": heads.V, "BK": key, "BV": bv, "HAS_DELTA": heads.delta}
        return Config(constants), cdiv(heads.V, bv)
    if kernel is scan_tables_kernel:
        constants = {"HV": heads.HV, "BLOCK_H": next_power_of_2(heads.HV)}
        return Config(constants | {"HAS_GATE": heads.gate, "HAS_DELTA": heads.delta}, num_warps=1), 1
    if kernel in _PIECES:
        return _piece_config(kernel, heads)
    # float32 products run on the plain units with their operands in registers: small blocks, more threads.
    wide, large = heads.dtype == torch.float32, shared_kb >= LARGE_KB
    bk, bv, warps = (min(key, 32), min(value, 32), 8) if wide else (min(key, 64), min(value, 64), 4)
    stages, registers = 1, None
    if kernel is chunk_scan_kernel and not heads.delta and not wide:
        bk, bv, stages = _plain_scan_blocks(heads, large, chains)
    elif kernel is chunk_scan_kernel and not wide:
        bk, bv, stages = _scan_blocks(heads, large, chains, {16: (256, 4), 32: (256, 3), 64: (128, 2)})
    elif kernel is chunk_scan_bwd_kernel and not wide:
        narrow = 128, 2 if heads.K > 128 else 3
        bk, bv, stages = _scan_blocks(heads, large, chains, {16: narrow, 32: narrow, 64: (64, 2)})
    elif kernel in (chunk_scan_kernel, chunk_scan_bwd_kernel):
        bv = min(value, 16)
    elif kernel is chunk_out_kernel and not wide and large:
        bv, stages = min(value, 128), 3
    elif kernel is chunk_bwd_kernel and not large:
        warps = 8  # without asynchronous products its tiles would not fit the registers of four
    elif kernel is chunk_bwd_kernel and not wide:
        stages = 3 if heads.gate or not heads.delta else 2  # two thread blocks a processor
    elif kernel is chunk_pairs_kernel and not wide and heads.delta:
        warps = 2  # its time is the inverse, small products whose operands change places: the fewer warps the better
    elif kernel in (chunk_pairs_kernel, chunk_pairs_bwd_kernel) and not wide and large:
        stages, registers = 3, 168 if heads.delta else None  # three thread blocks a processor
    constants |= {"BK": bk, "PRECISION": "ieee" if wide else "interpreter" if INTERPRET else "tf32"}
    constants["HAS_DELTA"] = heads.delta
    if kernel is not chunk_scan_bwd_kernel:
        computed = kernel is chunk_scan_kernel and (heads.gate or heads.delta)
        constants["FENCE"] = stages > 1 and not (FENCED or computed)
    if kernel is chunk_pairs_kernel:
        return Config(constants, warps, stages, registers=registers), 1
    constants |= {"V": heads.V, "BV": bv}
    blocks = cdiv(heads.V, bv)
    if kernel in (chunk_scan_kernel, chunk_scan_bwd_kernel):
        tiles = cdiv(heads.K, bk)
        constants["NK"] = tiles
        if kernel is chunk_scan_kernel and not heads.delta:
            constants["NK"], blocks = 1, tiles * blocks
    elif kernel is chunk_pairs_bwd_kernel:
        constants["STAGES"], blocks = stages, 1
    elif kernel is chunk_bwd_kernel:
        blocks = 1
    return Config(constants, warps, stages, registers=registers), blocks


_PIECES = (chunk_transition_kernel, chunk_join_kernel, chunk_piece_kernel)


def _piece_config(kernel: Any, heads: _Heads) -> tuple[Config, int]:
    """As :func:`_config`, for the scan in pieces, which is not for float32."""
    key, value = heads.K, heads.V
    constants: dict[str, Any] = {"HV": heads.HV, "K": key, "V": value, "PIECE": PIECE}
    constants["PRECISION"] = "interpreter" if INTERPRET else "tf32"
    stages = 3 if key <= 128 else 2  # three of 256 keys take more shared memory than there is
    if kernel is chunk_join_kernel:
        return Config(constants | {"BK": 64, "BV": 16, "FENCE": not FENCED}, num_stages=stages), value // 16
    bk, columns = min(key, 128), value + (key if kernel is chunk_transition_kernel else 0)
    constants |= {"H": heads.H, "HAS_GATE": heads.gate, "FENCE": False}
    constants |= {"BK": bk, "NK": key // bk, "BV": 64}
    return Config(constants, num_stages=stages), columns // 64


def _in_pieces(heads: _Heads, chains: int, chunks: int, segments: int, shared_kb: int) -> bool:
    """Whether few long chains are worth the work of the scan in pieces, more than twice that of the plain one."""
    fits = heads.delta and heads.dtype != torch.float32 and heads.K in (64, 128, 256) and heads.V % 64 == 0
    long = segments <= 16 and chunks >= 4 * PIECE * segments
    return fits and long and shared_kb >= LARGE_KB and chains * cdiv(heads.V, 16) <= PROCESSORS


def _few(heads: _Heads, chains: int) -> bool:
    """Whether the scans take blocks of at most 32 columns, of which a processor holds one.

    The chains of a MoM layer are not of one length, and the longest, the shared memory's, start first: short ones
    follow each other on a processor while a long one takes its time, so there may be more blocks than processors.
    """
    return chains * cdiv(heads.V, 32) <= PROCESSORS * 5 // 4


def _scan_blocks(heads: _Heads, large: bool, chains: int, choices: dict[int, tuple[int, int]]) -> tuple[int, int, int]:
    """BK, BV and stages of a scan; ``choices``: BK and stages by the columns of a block, 16, 32 or 64."""
    key, value = next_power_of_2(max(heads.K, 16)), next_power_of_2(max(heads.V, 16))
    if not large:
        return min(key, 64), min(value, 32), 1
    columns = 16 if chains * cdiv(heads.V, 16) <= PROCESSORS else 32 if _few(heads, chains) else 64
    bk, stages = choices[columns]
    return min(key, bk), min(value, columns), stages


def _plain_scan_blocks(heads: _Heads, large: bool, chains: int) -> tuple[int, int, int]:
    """BK, BV and stages of the scan of a plain write, k^T v, where every tile of the state is a block of its own."""
    key, value = next_power_of_2(max(heads.K, 16)), next_power_of_2(max(heads.V, 16))
    small = min(key, 64), min(value, 32)
    if not large:
        return *small, 1
    if chains * cdiv(heads.K, small[0]) * cdiv(heads.V, small[1]) <= 8 * PROCESSORS:
        return *small, 3
    return min(key, 128), min(value, 64), 3


def _run(kernel: Any, heads: _Heads, programs: int, *args: Any) -> None:
    config, blocks = _config(kernel, heads, shared_memory_kb(first_device(args)), programs)
    launch(kernel, (programs * blocks,), config, *args)


def _heads(q: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> _Heads:
    return _Heads(q.shape[-2], v.shape[-2], q.shape[-1], v.shape[-1], v.dtype, g is not None, beta is not None)


def _pairs(
    heads: _Heads, q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor | None, tables: tuple[Tensor, ...], scale: float
) -> tuple[Tensor | None, Tensor]:
    rows = q.shape[0]
    scores = q.new_empty(rows, heads.HV, CHUNK)
    inverse = torch.empty_like(scores) if heads.delta else None
    programs = rows // CHUNK * heads.HV
    _run(chunk_pairs_kernel, heads, programs, q, k, g, beta, *tables, tables[0].shape[0], inverse, scores, scale)
    return inverse, scores


def _scan_tables(
    heads: _Heads, g: Tensor | None, beta: Tensor | None, tables: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor]:
    """``[chunks, HV, 3, 64]``: the decay from the start and to the end of its chunk, and beta, of every row; and the
    segments in the order in which the scans start them."""
    segment_start, _, chunk_segment = tables
    gates = None
    if heads.gate or heads.delta:
        shape = (chunk_segment.shape[0], heads.HV, 3, CHUNK)
        gates = torch.empty(shape, dtype=torch.float32, device=segment_start.device)
    order = torch.empty_like(segment_start)
    chunks = chunk_segment.shape[0]
    # One program more than chunks: where there is none, the segments are ordered all the same.
    _run(scan_tables_kernel, heads, chunks + 1, g, beta, *tables, segment_start.shape[0], chunks, gates, order)
    return gates, order


def _scan(
    heads: _Heads,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    order: Tensor,
    inverse: Tensor | None,
    initial_state: Tensor | None,
    tables: tuple[Tensor, ...],
    zero_states: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Final state, states and v_new. States of chunks that no segment uses are not written, hence the zeros on demand;
    v_new is zeroed there by chunk_out. Memory is of the current stream, whatever ``stream`` the kernel runs on."""
    segment_start, segment_length, chunk_segment = tables
    state = (heads.HV, heads.K, heads.V)
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    final_state = v.new_empty(segment_start.shape[0], *state, dtype=dtype)
    states = (v.new_zeros if zero_states else v.new_empty)(chunk_segment.shape[0], *state)
    v_new = torch.empty_like(v) if heads.delta else v
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        _run(
            chunk_scan_kernel, heads, segment_start.shape[0] * heads.HV, k, v, gates, inverse, initial_state,
            order, segment_start, segment_length, k.shape[0], final_state, states, v_new if heads.delta else None,
        )  # fmt: skip
    return final_state, states, v_new


def _out_in_pieces(
    heads: _Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    inverse: Tensor | None,
    scores: Tensor,
    initial_state: Tensor | None,
    tables: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o and the final state, where nothing else is kept. The states differ from :func:`_scan`'s by rounding: not for a
    backward, which computes them again."""
    segment_start, segment_length, chunk_segment = tables
    rows, segments, chunks = k.shape[0], segment_start.shape[0], chunk_segment.shape[0]
    pieces = chunks // PIECE + segments  # at most
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    final_state, o = v.new_empty(segments, heads.HV, heads.K, heads.V, dtype=dtype), v.new_empty(v.shape)
    transitions = v.new_empty(pieces, heads.HV, 2, heads.K, heads.K + heads.V, dtype=torch.bfloat16)
    starts = transitions.new_empty(pieces, heads.HV, 2, heads.K, heads.V)
    spans, programs = (segment_start, segment_length, segments), pieces * heads.HV
    _run(chunk_transition_kernel, heads, programs, k, v, gates, inverse, initial_state, *spans, rows, transitions)
    _run(
        chunk_join_kernel, heads, segments * heads.HV, transitions, initial_state, *spans[1:], starts, final_state
    )  # fmt: skip
    _run(
        chunk_piece_kernel, heads, programs, q, k, v, gates, inverse, scores, *tables, segments, rows, chunks, starts,
        final_state, o, scale,
    )  # fmt: skip
    return o, final_state


def chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    scale: float,
    save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked forward on aligned rows; shapes and results as ``mom::chunk_gated_delta_rule`` (see op.py)."""
    heads, tables = _heads(q, v, g, beta), (segment_start, segment_length, chunk_segment)
    gates, order = _scan_tables(heads, g, beta, tables)
    inverse, scores = _pairs(heads, q, k, g, beta, tables, scale)
    segments, chunks = segment_start.shape[0], chunk_segment.shape[0]
    alone = save == 0 and launches_run()  # nothing else computes these states again, or plans these launches
    if alone and _in_pieces(heads, segments * heads.HV, chunks, segments, shared_memory_kb(q.device)):
        o, final_state = _out_in_pieces(heads, q, k, v, gates, inverse, scores, initial_state, tables, scale)
        return o, final_state, v.new_empty(0), v.new_empty(0), v.new_empty(0), v.new_empty(0)
    final_state, states, v_new = _scan(
        heads, k, v, gates, order, inverse, initial_state, tables, bool(save & SAVE_STATES)
    )
    o = torch.empty_like(v)
    programs = v.shape[0] // CHUNK * heads.HV
    _run(chunk_out_kernel, heads, programs, q, gates, v_new, scores, states, *tables, segment_start.shape[0], o, scale)
    return (
        o,
        final_state,
        inverse if save & SAVE_INVERSE and inverse is not None else v.new_empty(0),
        scores if save & SAVE_SCORES else v.new_empty(0),
        states if save & SAVE_STATES else v.new_empty(0),
        v_new if save & SAVE_V_NEW and heads.delta else v.new_empty(0),
    )


def chunk_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    inverse: Tensor,
    scores: Tensor,
    states: Tensor,
    v_new: Tensor,
    do: Tensor,
    dfinal_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_fwd`; absent ones have shape [0]. What was not saved is computed again."""
    heads, tables = _heads(q, v, g, beta), (segment_start, segment_length, chunk_segment)
    rows, programs = q.shape[0], q.shape[0] // CHUNK * heads.HV
    groups = heads.HV // heads.H
    gates, order = _scan_tables(heads, g, beta, tables)
    a: Tensor | None = inverse
    if scores.numel() == 0 or (heads.delta and inverse.numel() == 0):
        a, scores = _pairs(heads, q, k, g, beta, tables, scale)
    if not heads.delta:
        a, v_new = None, v
    replay = final = None
    if v_new.numel() == 0:
        _, states, v_new = _scan(heads, k, v, gates, order, a, initial_state, tables)
    elif states.numel() == 0:
        # With v_new known the write is plain: one product a chunk, which does not wait for the state.
        plain, plain_gates = heads._replace(delta=False), gates if heads.gate else None
        if _few(heads, segment_start.shape[0] * heads.HV):
            # Beside the scan of the gradient, which then leaves processors idle and does not need the states.
            replay = fork(q.device)
        # Held until `join`: what it writes to must not be given to another tensor before.
        final, states, _ = _scan(plain, k, v_new, plain_gates, order, None, initial_state, tables, stream=replay)

    dstates = torch.empty_like(states)
    dv = torch.empty_like(v)
    dw = torch.empty_like(v) if heads.delta else dv
    dinitial = v.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    _run(
        chunk_scan_bwd_kernel, heads, segment_start.shape[0] * heads.HV, q, k, gates, a, scores, do, dfinal_state,
        order, segment_start, segment_length, rows, dstates, dw, None if initial_state is None else dinitial, scale,
    )  # fmt: skip

    def rows_of_heads(like: Tensor | None) -> Tensor | None:
        return None if like is None else torch.empty(rows, heads.HV, dtype=torch.float32, device=q.device)

    dqk = q.new_empty(rows, heads.HV, CHUNK)
    dkk = torch.empty_like(dqk) if heads.delta else None
    gate_part, beta_part = rows_of_heads(g), rows_of_heads(beta)
    _run(
        chunk_pairs_bwd_kernel, heads, programs, k, v, g, beta, scores if heads.gate else None, v_new, do,
        dw if heads.delta else None, *tables, segment_start.shape[0], dqk, dkk, dv, gate_part, beta_part, scale,
    )  # fmt: skip

    dtype = q.dtype if groups == 1 else torch.float32
    join(replay)
    del final
    dq = q.new_empty(rows, heads.HV, heads.K, dtype=dtype)
    dk = torch.empty_like(dq)
    dg = v.new_empty(0) if g is None else torch.empty_like(g)
    dbeta = v.new_empty(0) if beta is None else torch.empty_like(beta)
    _run(
        chunk_bwd_kernel, heads, programs, q, k, gates, v_new, do, dw if heads.delta else None, states, dstates,
        dqk, dkk, gate_part, beta_part, *tables, segment_start.shape[0],
        dq, dk, None if g is None else dg, None if beta is None else dbeta,
        scale,
    )  # fmt: skip
    if groups > 1:
        dq, dk = (x.view(rows, heads.H, groups, heads.K).sum(2).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


def recurrent_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:
    """Sequential form on ``[B, T, H, K]``; ``state`` ``[P, HV, K, V]`` is advanced in place."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Tokens outside every document are written by no program.
    o = torch.empty_like(v) if cu_seqlens is None else torch.zeros_like(v)
    heads = _heads(q, v, g, beta)
    _run(
        recurrent_kernel, heads, sequences * heads.HV, q, k, v, g, beta, state, state_indices, cu_seqlens, o,
        q.shape[1], state.shape[0], scale,
    )  # fmt: skip
    return o


_TYPES = {
    "gates": "*fp32",
    **dict.fromkeys(("g", "state", "initial_state", "final_state", "dfinal_state", "dinitial_state"), "*fp32"),
    **dict.fromkeys(("dgate", "gate_part", "beta_part", "dg"), "*fp32"),
    **dict.fromkeys(("transitions", "starts"), "*bf16"),
    **dict.fromkeys(("segment_start", "segment_length", "chunk_segment", "order"), "*i32"),
    **dict.fromkeys(("state_indices", "cu_seqlens"), "*i64"),
    **dict.fromkeys(("tokens", "pool", "rows", "segments", "chunks"), "i32"),
    "scale": "fp32",
}
"""Triton type of each kernel argument; those not named are pointers to the dtype of v."""
_GATE_ONLY = ("g", "dg", "dgate", "gate_part")
_DELTA_ONLY = ("beta", "dbeta", "inverse", "dw", "dkk", "beta_part")
_KERNELS = (
    scan_tables_kernel,
    chunk_pairs_kernel,
    chunk_scan_kernel,
    *_PIECES,
    chunk_out_kernel,
    chunk_scan_bwd_kernel,
    chunk_pairs_bwd_kernel,
    chunk_bwd_kernel,
    recurrent_kernel,
)


def variants() -> Iterator[KernelVariant]:
    """Every kernel as the launches make it, over dtypes, head dims and rules."""
    shapes = [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (64, 128)]
    for kernel in _KERNELS:
        for dtype in KERNEL_DTYPES:
            for key, value in shapes:
                for gate, delta in ((False, False), (True, False), (False, True), (True, True)):
                    heads = _Heads(1, 2, key, value, dtype, gate, delta)
                    if kernel not in _PIECES or _in_pieces(heads, 1, MANY, 1, LARGE_KB):
                        yield from _variants(kernel, heads)


def _variants(kernel: Any, heads: _Heads) -> Iterator[KernelVariant]:
    """One for each configuration that differs between the architectures."""
    served: list[tuple[Config, list[int]]] = []
    for architecture, shared_kb in SHARED_MEMORY_KB.items():
        for chains in (MANY,) if kernel in _PIECES else (1, PROCESSORS * 32 // heads.V, MANY):
            if kernel in _PIECES and shared_kb < LARGE_KB:
                continue
            config, _ = _config(kernel, heads, shared_kb, chains)
            known = next((architectures for other, architectures in served if other == config), None)
            if known is None:
                served.append((config, [architecture]))
            elif architecture not in known:
                known.append(architecture)
    for config, architectures in served:
        yield replace(_variant(kernel, heads, config), architectures=tuple(architectures))


def _variant(kernel: Any, heads: _Heads, config: Config) -> KernelVariant:
    absent = (() if heads.gate else _GATE_ONLY) + (() if heads.delta else _DELTA_ONLY)
    absent += () if heads.gate or heads.delta else ("gates",)
    if kernel is chunk_scan_kernel and not heads.delta:
        absent += ("v_new",)
    if kernel is chunk_pairs_bwd_kernel and not heads.gate:
        absent += ("scores",)
    if kernel is chunk_scan_bwd_kernel:
        absent = tuple(name for name in absent if name != "dw")  # dv without the delta
    types = _TYPES | ({"dbeta": "*fp32"} if kernel is chunk_pairs_bwd_kernel else {})
    names = [name for name in kernel.arg_names if name not in config.constants]
    arguments = {name: None if name in absent else types.get(name, pointer(heads.dtype)) for name in names}
    rule = " ".join(name for name, has in (("gate", heads.gate), ("delta", heads.delta)) if has) or "additive"
    blocks = f" BV={config.constants['BV']}" if kernel in (chunk_scan_kernel, chunk_scan_bwd_kernel) else ""
    label = f"K={heads.K} V={heads.V}{blocks} {str(heads.dtype).removeprefix('torch.')} {rule}"
    quick = heads.K == heads.V == 64 and heads.gate and heads.delta
    return variant(label, kernel, arguments, config, quick)
