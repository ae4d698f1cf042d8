"""The kernel between the small products of prefill and its chunked rule, which PyTorch's compiler fuses elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import MoMConfig
from ..ops._launch import Config, launch, next_power_of_2
from ..ops._layout import CHUNK
from ..ops._triton_kernels import softplus
from ..ops.memory_rule.rules import RULES


@triton.jit(do_not_specialize=["tokens"])
def gate_rows_kernel(
    small, A_log, dt_bias, decay, entry_of, chunk_segment, v, g, beta, tokens,
    HV: tl.constexpr, V: tl.constexpr, MEMORIES: tl.constexpr, GROUPS: tl.constexpr, CHOICES: tl.constexpr,
    DELTA: tl.constexpr, SCALAR: tl.constexpr, TIMES_DT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gates of the rows of one chunk; where TIMES_DT its values too, multiplied by dt in place."""
    P: tl.constexpr = (DELTA + SCALAR) * GROUPS * HV
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    entry = tl.load(entry_of + row)
    token = entry // CHOICES
    real = (entry >= 0) & (token < tokens)
    # Segments are numbered sequence by sequence, the memories of one inside.
    memory = tl.maximum(tl.load(chunk_segment + chunk), 0) % MEMORIES
    group = memory if GROUPS > 1 else memory * 0
    head = tl.arange(0, BLOCK_H)
    mask = real[:, None] & (head < HV)[None, :]
    first = token.to(tl.int64) * P + group * HV
    out = row[:, None] * HV + head[None, :]
    inside = (head < HV)[None, :] & (row >= 0)[:, None]
    if DELTA:
        value = tl.load(small + first[:, None] + head[None, :], mask=mask, other=0.0)
        tl.store(beta + out, tl.where(mask, tl.sigmoid(value), 0.0), mask=inside)
    if decay is not None:
        value = tl.load(decay + head, mask=head < HV, other=0.0)
        tl.store(g + out, tl.where(mask, value[None, :], 0.0), mask=inside)
    if SCALAR:
        first += DELTA * GROUPS * HV
        bias = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))
        value = tl.load(small + first[:, None] + head[None, :], mask=mask, other=0.0)
        dt = softplus(value + bias[None, :])
        tl.store(g + out, tl.where(mask, -rate[None, :] * dt, 0.0), mask=inside)
        if TIMES_DT:
            lane = tl.arange(0, BLOCK_V)
            for one in range(HV):
                of_one = tl.load(small + first + one, mask=real, other=0.0)
                dt_of = softplus(of_one + tl.load(dt_bias + one).to(tl.float32))
                address = v + (row[:, None] * HV + one) * V + lane[None, :]
                valid = real[:, None] & (lane < V)[None, :]
                old = tl.load(address, mask=valid, other=0.0)
                new = old.to(tl.float32) * dt_of.to(old.dtype).to(tl.float32)[:, None]
                tl.store(address, new.to(old.dtype), mask=valid)


class GateRows(NamedTuple):
    """g and beta of every row, ``[S, HV]`` float32, None where the rule has none; zero on pad rows."""

    g: Tensor | None
    beta: Tensor | None


def gate_rows(
    config: MoMConfig,
    rule: str,
    small: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    decay: Tensor | None,
    entry_of: Tensor,
    chunk_segment: Tensor,
    v: Tensor,
) -> GateRows:
    """Gates of the rows of a dispatch plan.

    Args:
        config: sizes.
        rule: a rule with a gate or a delta.
        small: ``[T, n G HV]`` float32, the tokens' products with b (delta rules) and a (scalar gates), group by group.
        A_log, dt_bias: ``[HV]``, for a scalar gate.
        decay: ``[HV]`` float32 g of every token, for a gate that is constant per head.
        entry_of, chunk_segment: tables of the plan.
        v: ``[S, HV, V]``; for mamba2 multiplied by dt in place, else untouched.

    Source: mom_compile.projections.route_and_gate and mom_compile.packed, of which it is the forward.
    """
    kind, rows = RULES[rule], entry_of.shape[0]
    heads, scalar = config.value_heads, kind.gate == "scalar"

    def gate(present: bool) -> Tensor | None:
        return torch.empty(rows, heads, dtype=torch.float32, device=v.device) if present else None

    result, times_dt = GateRows(gate(kind.gate != "none"), gate(kind.delta)), rule == "mamba2"
    tokens = entry_of.shape[0] if small is None else small.shape[0]
    chosen = Config(
        {
            "HV": heads,
            "V": config.value_dim,
            "MEMORIES": config.total_memories,
            "GROUPS": 1 if config.single_kv_proj else config.total_memories,
            "CHOICES": config.topk + int(config.shared_mem),
            "DELTA": int(kind.delta),
            "SCALAR": int(scalar),
            "TIMES_DT": times_dt,
            "CHUNK": CHUNK,
            "BLOCK_H": next_power_of_2(heads),
            "BLOCK_V": next_power_of_2(max(config.value_dim, 16)),
        }
    )
    launch(
        gate_rows_kernel, (rows // CHUNK,), chosen, small, A_log, dt_bias, decay, entry_of, chunk_segment,
        v if times_dt else None, *result, tokens,
    )  # fmt: skip
    return result
