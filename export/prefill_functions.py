"""The functions of a kernel pack that, with plain matrix products, make up a prefill of packed sequences.

They stand for :mod:`mom_compile.packed` without gradients. ``ORDER`` says how they follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import MoMConfig
from ..ops._layout import CHUNK
from ..ops.combine import launch as combine
from ..ops.conv_qkv import launch as conv_qkv
from ..ops.decode_linear import launch as decode_linear
from ..ops.dispatch import DispatchPlan
from ..ops.dispatch import cpu as dispatch_cpu
from ..ops.dispatch import launch as dispatch
from ..ops.gated_rms_norm import launch as gated_rms_norm
from ..ops.grouped_linear import launch as grouped_linear
from ..ops.memory_rule import launch as memory_rule
from ..ops.memory_rule.rules import RULES
from ..ops.permute import launch as permute
from ..ops.route import launch as route
from .decode_functions import small_parts
from .kernel_function import Dtypes, Function, Inputs
from .launch_formula import Units
from .prefill_gates import gate_rows

ORDER = """\
Prefill of N sequences packed into T tokens, states in the layout of MoMForCausalLM.init_state. RULE: of the layer.
PRODUCT: a plain matrix product, y[T, O] = x[T, F] w[O, F]^T in the pack's dtype with sums in float32, which the
application takes from cuBLAS or CUTLASS, as it takes the sampling of tokens from elsewhere. The weights behind
attn_norm and mlp_norm have the norm's weight multiplied into their columns, as for decode. Every pointer argument is a
buffer of the application, intermediate tables too; mom_amount says its bytes, and mom_run takes them by name.

  embed                 x[T, D] out of the embedding; entry_of: token ids as int32
  for each layer
    prefill_input       n = norm(x); logits[T, M], of the router's weight in float32
    prefill_small_RULE  small[T, ...], of b_proj then a_proj (those that the rule has), group by group, in float32
    route               weights and indices of the memories
    dispatch            the tables of the rows; bounds: N + 1 offsets from 0 to T; units of it and of all that take its
                        tables: sequences N, chunks mom_chunks(N, T) or more, tokens T
    PRODUCT             q = n q_proj^T; gate = n g_proj^T
    permute             n in rows
    kv_rows             keys and values of the rows (with single_kv_proj: a PRODUCT)
    conv_qkv            convolution, SiLU and norm: q, k and v of the rows; state and out: conv_state before and after
                        (without a convolution: SiLU and norm alone, weight: ones)
    gate_rows_RULE      g and beta of the rows (decay of retention: log(1 - 2^(-5-h)) for head h)
    chunk_RULE          o of the rows; initial_state and final_state: recurrent_state before and after (without a delta
                        rule v_new is v)
    combine             o of the tokens
    gated_rms_norm      over T HV rows (without an output gate: prefill_output)
    PRODUCT             x += o o_proj^T
    prefill_norm        n = norm(x)
    PRODUCT             h = n [gate_proj; up_proj]^T
    swiglu              SiLU(left half) * right half
    PRODUCT             x += h down_proj^T
  prefill_head          the last norm, with its weight, of the rows that are wanted
  PRODUCT               logits; for few rows decode_head"""

PLAN = ("sequences", "chunks", "tokens")
MOST_SEQUENCES, MOST_TOKENS = 4096, 1 << 20


def prefill_functions(config: MoMConfig, dtypes: Dtypes) -> Iterator[Function]:
    """Everything but the products; see ``ORDER``."""

    def function(name: str, operator: str, units: tuple[str, ...], make: Any, *args: Any) -> Function:
        limit = MOST_SEQUENCES if units == PLAN else MOST_TOKENS
        return Function(name, operator, units, limit, partial(make, config, dtypes, *args))

    tokens, rows = ("tokens",), ("rows",)
    yield function("embed", "mom::permute", tokens, _embed)
    yield function("prefill_input", "mom::decode_linear", tokens, _prepare, config.num_memories, False)
    yield function("prefill_norm", "mom::decode_linear", tokens, _prepare, 0, False)
    yield function("prefill_head", "mom::decode_linear", tokens, _prepare, 0, True)
    yield function("swiglu", "mom::decode_linear", tokens, _swiglu)
    yield function("route", "mom::route", tokens, _route)
    yield function("dispatch", "mom::dispatch", PLAN, _dispatch)
    yield function("permute", "mom::permute", PLAN, _permute)
    if not config.single_kv_proj:
        yield function("kv_rows", "mom::grouped_linear", PLAN, _kv_rows)
    yield function("conv_qkv", "mom::conv_qkv", PLAN, _conv_qkv)
    for rule in dict.fromkeys(config.rule(layer) for layer in range(config.num_hidden_layers)):
        kind = RULES[rule]
        if small := _gate_outputs(config, rule):
            name = f"prefill_small_{rule}"
            yield function(name, "mom::decode_linear", tokens, _prepare, small, False)
        if kind.delta or kind.gate != "none":
            yield function(f"gate_rows_{rule}", "packed form's gates", PLAN, _gate_rows, rule)
        yield function(f"chunk_{rule}", f"mom::chunk_{kind.op}", PLAN, _chunk_rule, rule)
    yield function("combine", "mom::combine", PLAN, _combine)
    if config.use_output_gate:
        yield function("gated_rms_norm", "mom::gated_rms_norm", rows, _gated_rms_norm)
    else:
        yield function("prefill_output", "mom::decode_linear", rows, _output_norm)


def _gate_outputs(config: MoMConfig, rule: str) -> int:
    """Of the small products those that the router does not have."""
    return sum(count for name, count in small_parts(config, rule).items() if name != "logits")


def _routing(config: MoMConfig, units: Units, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random indices ``[T, k]`` and sequences of nearly equal length, some of them empty where tokens are few."""
    sequences, _, tokens = units
    if device.type == "meta":
        indices = torch.empty(tokens, config.topk, dtype=torch.int64, device=device)
        return indices, torch.empty(sequences + 1, dtype=torch.int64, device=device)
    indices = torch.rand(tokens, config.num_memories).argsort(1)[:, : config.topk].contiguous()
    return indices.to(device), (torch.arange(sequences + 1) * tokens // max(sequences, 1)).to(device)


def _plan(config: MoMConfig, units: Units, device: torch.device) -> DispatchPlan:
    """Tables of a random routing, with unused chunks at the end where there are more than it needs."""
    sequences, chunks, tokens = units
    memories, choices = config.total_memories, config.topk + int(config.shared_mem)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    if device.type == "meta":
        segments = sequences * memories
        return DispatchPlan(
            empty(tokens, choices), empty(chunks * CHUNK), empty(segments), empty(segments), empty(chunks),
            empty(memories + 1),
        )  # fmt: skip
    indices, bounds = (table.cpu() for table in _routing(config, units, device))
    plan = DispatchPlan(*dispatch_cpu.dispatch(indices, bounds, None, config.num_memories, config.shared_mem, CHUNK))
    unused = chunks - plan.chunk_segment.shape[0]
    assert unused >= 0, f"{units} has too few chunks"
    pad = torch.nn.functional.pad
    entry_of = pad(plan.entry_of, (0, unused * CHUNK), value=-1)
    plan = plan._replace(entry_of=entry_of, chunk_segment=pad(plan.chunk_segment, (0, unused), value=-1))
    return DispatchPlan(*(table.to(device) for table in plan))


def _embed(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    tokens, table = units[0], Inputs(dtypes, device)(config.vocab_size, config.hidden_size)
    ids = torch.randint(config.vocab_size, (tokens,), dtype=torch.int32, device=device)
    return permute.permute_fwd(table, ids.new_empty(0, 1), ids)


def _prepare(
    config: MoMConfig, dtypes: Dtypes, small: int, weighted: bool, units: Units, device: torch.device
) -> tuple[Tensor, Tensor]:
    new, width = Inputs(dtypes, device), config.hidden_size
    weight = new(width) if weighted else None
    return decode_linear.prepare(
        new(units[0], width), weight, new.wide(small, width) if small else None, True, config.norm_eps
    )


def _output_norm(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> tuple[Tensor, Tensor]:
    new, size = Inputs(dtypes, device), config.value_dim
    return decode_linear.prepare(new(units[0], size), new(size), None, True, config.norm_eps)


def _swiglu(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    return decode_linear.combine_halves(Inputs(dtypes, device)(units[0], 2 * config.mlp_size))


def _route(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> tuple[Tensor, Tensor]:
    return route.route_fwd(Inputs(dtypes, device).wide(units[0], config.num_memories), config.topk)


def _dispatch(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> tuple[Tensor, ...]:
    indices, bounds = _routing(config, units, device)
    rows = units[1] * CHUNK
    return dispatch.dispatch(indices, bounds, None, config.num_memories, config.shared_mem, CHUNK, rows)


def _permute(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    plan = _plan(config, units, device)
    return permute.permute_fwd(Inputs(dtypes, device)(units[2], config.hidden_size), plan.slot_of, plan.entry_of)


def _columns(config: MoMConfig) -> tuple[int, int]:
    return config.num_heads * config.head_dim, config.value_heads * config.value_dim


def _kv_rows(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    new, width = Inputs(dtypes, device), config.hidden_size
    plan, rows = _plan(config, units, device), new(units[1] * CHUNK, width)
    weight = new(config.total_memories, sum(_columns(config)), width)
    return grouped_linear.grouped_linear_own(rows, weight, plan.group_offset)


def _conv_qkv(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> tuple[Tensor, ...]:
    new, plan, (keys, values) = Inputs(dtypes, device), _plan(config, units, device), _columns(config)
    width = config.conv_size if config.use_short_conv else 1
    channels, segments = 2 * keys + values, units[0] * config.total_memories
    return conv_qkv.conv_qkv_fwd(
        new(units[2], keys),
        new(units[1] * CHUNK, keys + values),
        new(channels, width),
        new.kept(segments, channels, width - 1) if width > 1 else None,
        plan.slot_of,
        plan.entry_of,
        *plan.segments,
        config.head_dim,
    )


def _gate_rows(config: MoMConfig, dtypes: Dtypes, rule: str, units: Units, device: torch.device) -> tuple[Tensor, ...]:
    new, plan, kind = Inputs(dtypes, device), _plan(config, units, device), RULES[rule]
    scalar, heads, small = kind.gate == "scalar", config.value_heads, _gate_outputs(config, rule)
    v = new(units[1] * CHUNK, heads, config.value_dim)
    result = gate_rows(
        config,
        rule,
        new.wide(units[2], small) if small else None,
        new.kept(heads) if scalar else None,
        new.kept(heads) if scalar else None,
        -new.wide(heads).abs() if kind.gate == "head" else None,
        plan.entry_of,
        plan.chunk_segment,
        v,
    )
    return (v, *(gate for gate in result if gate is not None))


def _chunk_rule(config: MoMConfig, dtypes: Dtypes, rule: str, units: Units, device: torch.device) -> tuple[Tensor, ...]:
    new, plan, kind = Inputs(dtypes, device), _plan(config, units, device), RULES[rule]
    rows, heads, value_heads = units[1] * CHUNK, config.num_heads, config.value_heads
    q, k = (torch.nn.functional.normalize(new(rows, heads, config.head_dim), dim=-1) for _ in range(2))
    return memory_rule.chunk_fwd(
        q,
        k,
        new(rows, value_heads, config.value_dim),
        None if kind.gate == "none" else -new.wide(rows, value_heads).abs(),
        new.wide(rows, value_heads).sigmoid() if kind.delta else None,
        new.wide(units[0] * config.total_memories, value_heads, config.head_dim, config.value_dim),
        *plan.segments,
        config.head_dim**-0.5,
        0,
    )


def _combine(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    new, plan = Inputs(dtypes, device), _plan(config, units, device)
    rows = new(units[1] * CHUNK, config.value_heads, config.value_dim)
    return combine.combine_fwd(rows, new.wide(units[2], config.topk).abs(), plan.slot_of, plan.entry_of)


def _gated_rms_norm(config: MoMConfig, dtypes: Dtypes, units: Units, device: torch.device) -> Tensor:
    new, size = Inputs(dtypes, device), config.value_dim
    return gated_rms_norm.gated_rms_norm_fwd(new(units[0], size), new(units[0], size), new(size), config.norm_eps)
