"""Registration of ``mom::decode_step`` and its in-place twin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_range, check_rank, check_same_device, check_shape
from .._library import register_op
from .._triton import LazyLaunch
from ..memory_rule.rules import RULES
from . import cpu

launch = LazyLaunch(__package__ or "")

MAX_TOKENS = 8
WIDE = (torch.float32, torch.float64)


class Arguments(NamedTuple):
    """What the schema names, in its order."""

    q: Tensor
    kv: Tensor
    router_logits: Tensor | None
    router_indices: Tensor | None
    router_weights: Tensor | None
    a: Tensor | None
    b: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    conv_weight: Tensor | None
    recurrent_state: Tensor
    conv_state: Tensor | None
    valid: Tensor | None
    rule: str
    topk: int
    shared: bool
    scale: float
    norm_weight: Tensor | None = None
    gate: Tensor | None = None
    eps: float = 1e-6


def _check(args: Arguments) -> None:
    if args.rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {args.rule!r}; choose one of them")
    rule, state = RULES[args.rule], args.recurrent_state
    check_rank("recurrent_state", state, "[B, M', HV, K, V]")
    check_dtype("recurrent_state", state, FLOATS)
    batch, total, value_heads, key_dim, value_dim = state.shape
    check_shape("q", args.q, (batch, None, None), "[B, T, H * K]")
    check_dtype("q", args.q, FLOATS)
    tokens, key_size = args.q.shape[1:]
    check_range("q.shape[1]", tokens, 0, MAX_TOKENS, "use the chunked rules for more tokens")
    if key_dim == 0 or key_size == 0 or key_size % key_dim or value_heads % (key_size // key_dim):
        raise ValueError(
            f"q must be [B, T, H * K] for K = {key_dim} and H a divisor of HV = {value_heads}, got shape "
            f"{tuple(args.q.shape)}; make its sizes agree with recurrent_state"
        )
    width = key_size + value_heads * value_dim
    check_rank("kv", args.kv, "[B, T, G, H * K + HV * V]")
    groups = args.kv.shape[2] if args.kv.shape[2] == 1 else total
    check_shape("kv", args.kv, (batch, tokens, groups, width), "[B, T, G, H * K + HV * V], G = M' or 1")
    check_dtype("kv", args.kv, (args.q.dtype,))
    _check_routing(args, (batch, tokens), total - int(args.shared))
    for name, needed in (("a", rule.gate == "scalar"), ("b", rule.delta)):
        value = getattr(args, name)
        _check_needed(name, value, needed, f"rule {args.rule}")
        if value is not None:
            check_shape(name, value, (batch, tokens, groups, value_heads), "[B, T, G, HV]")
            check_dtype(name, value, WIDE)
    for name in ("A_log", "dt_bias"):
        value = getattr(args, name)
        _check_needed(name, value, rule.gate == "scalar", f"rule {args.rule}")
        if value is not None:
            check_shape(name, value, (value_heads,), "[HV]")
            check_dtype(name, value, FLOATS)
    _check_needed(
        "conv_weight", args.conv_weight, args.conv_state is not None, f"conv_state {_presence(args.conv_state)}"
    )
    if args.conv_weight is not None and args.conv_state is not None:
        channels = key_size + width
        check_shape("conv_weight", args.conv_weight, (channels, None), "[C, W]")
        check_range("conv_weight.shape[1]", args.conv_weight.shape[1], 2, 16, "4 is usual")
        shape = (batch, total, channels, args.conv_weight.shape[1] - 1)
        check_shape("conv_state", args.conv_state, shape, "[B, M', C, W-1]")
        check_dtype("conv_state", args.conv_state, FLOATS)
    if args.valid is not None:
        check_shape("valid", args.valid, (batch, tokens), "[B, T]")
        check_dtype("valid", args.valid, (torch.bool,))
    if args.norm_weight is not None:
        check_shape("norm_weight", args.norm_weight, (value_dim,), "[V]")
        check_dtype("norm_weight", args.norm_weight, (args.q.dtype,))
    if args.gate is not None:
        if args.norm_weight is None:
            raise ValueError("norm_weight must be given with gate, got None; the gate stands behind the norm")
        check_shape("gate", args.gate, (batch, tokens, value_heads * value_dim), "[B, T, HV * V]")
        check_dtype("gate", args.gate, (args.q.dtype,))
    check_same_device("q", args.q, **{k: v for k, v in args._asdict().items() if isinstance(v, Tensor)})


def _presence(value: Tensor | None) -> str:
    return "None" if value is None else "given"


def _check_needed(name: str, value: Tensor | None, needed: bool, why: str) -> None:
    if (value is not None) != needed:
        rule = "be given" if needed else "be None"
        raise ValueError(f"{name} must {rule} with {why}, got {'None' if needed else 'a tensor'}; pass what it reads")


def _check_routing(args: Arguments, lead: tuple[int, int], memories: int) -> None:
    check_range("topk", args.topk, 1, memories, "select at least one and at most num_memories memories")
    if args.router_logits is not None:
        check_shape("router_logits", args.router_logits, (*lead, memories), "[B, T, M]")
        check_dtype("router_logits", args.router_logits, WIDE)
    _check_needed("router_weights", args.router_weights, args.router_logits is None, "router_logits " + (
        _presence(args.router_logits)
    ))  # fmt: skip
    if args.router_logits is None and args.router_indices is None:
        raise ValueError("router_indices must be given with router_weights, got None; pass the selected memories")
    if args.router_indices is not None:
        check_shape("router_indices", args.router_indices, (*lead, args.topk), "[B, T, k]")
        check_dtype("router_indices", args.router_indices, (torch.int64,))
    if args.router_weights is not None:
        check_shape("router_weights", args.router_weights, (*lead, args.topk), "[B, T, k]")
        check_dtype("router_weights", args.router_weights, WIDE)


def _output_shape(args: Arguments) -> tuple[int, ...]:
    state = args.recurrent_state
    return (*args.q.shape[:2], state.shape[2], state.shape[4])


def _fake(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = Arguments(*values)
    _check(args)
    state, window = args.recurrent_state, args.conv_state
    return (
        args.q.new_empty(_output_shape(args)),
        state.new_empty(state.shape),
        args.q.new_empty(0) if window is None else window.new_empty(window.shape),
    )


def _fake_in_place(*values: Any) -> Tensor:
    args = Arguments(*values)
    _check(args)
    return args.q.new_empty(_output_shape(args))


def _functional(run: Any, values: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    args = Arguments(*values)
    _check(args)
    state = args.recurrent_state.clone(memory_format=torch.contiguous_format)
    window = None if args.conv_state is None else args.conv_state.clone(memory_format=torch.contiguous_format)
    o = run(*args._replace(recurrent_state=state, conv_state=window))
    return o, state, args.q.new_empty(0) if window is None else window


def _in_place(run: Any, values: tuple[Any, ...]) -> Tensor:
    args = Arguments(*values)
    _check(args)
    for name in ("recurrent_state", "conv_state"):
        value = getattr(args, name)
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be updated in place, got a strided one; call .contiguous()")
    return run(*args)


_INPUTS = (
    "Tensor q, Tensor kv, Tensor? router_logits, Tensor? router_indices, Tensor? router_weights, Tensor? a, Tensor? b, "
    "Tensor? A_log, Tensor? dt_bias, Tensor? conv_weight"
)
_OPTIONS = (
    "Tensor? valid, str rule, int topk, bool shared, float scale, Tensor? norm_weight=None, Tensor? gate=None, "
    "float eps=1e-06"
)

decode_step_functional = register_op(
    "decode_step",
    f"({_INPUTS}, Tensor recurrent_state, Tensor? conv_state, {_OPTIONS}) -> "
    "(Tensor o, Tensor new_recurrent_state, Tensor new_conv_state)",
    fake=_fake,
    cpu=lambda *args: _functional(cpu.decode_step, args),
    triton=lambda *args: _functional(launch.decode_step, args),
)
decode_step_in_place = register_op(
    "decode_step_",
    f"({_INPUTS}, Tensor(a!) recurrent_state, Tensor(b!)? conv_state, {_OPTIONS}) -> Tensor",
    mutates_args=("recurrent_state", "conv_state"),
    fake=_fake_in_place,
    cpu=lambda *args: _in_place(cpu.decode_step, args),
    triton=lambda *args: _in_place(launch.decode_step, args),
)
