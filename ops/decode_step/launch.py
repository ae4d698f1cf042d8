"""Launches of the Triton kernels, and the configurations that they use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, cdiv, launch, next_power_of_2, overlapped, pointer, variant
from ..memory_rule.rules import RULES
from .kernels import decode_combine_kernel, decode_state_kernel

BLOCKS = {16: 16, 128: 32}
"""States of one head, at most -> columns of their tiles, narrow ones where few would leave multiprocessors idle."""
WIDE_BLOCK = 64
"""Columns where there are more."""
COMBINED = 512
"""Values that one program of the second kernel sums, where a head is not larger."""


class _Sizes(NamedTuple):
    """What a launch depends on besides the batch."""

    H: int
    HV: int
    K: int
    V: int
    M: int
    topk: int
    shared: bool
    single: bool
    width: int  # 0 without a convolution
    rule: str

    @property
    def choices(self) -> int:
        return self.topk + int(self.shared)


def _routing_constants(sizes: _Sizes) -> dict[str, Any]:
    return {
        "M": sizes.M,
        "TOPK": sizes.topk,
        "SHARED": int(sizes.shared),
        "SINGLE": int(sizes.single),
        "WIDTH": sizes.width,
        "BLOCK_M": next_power_of_2(max(sizes.M, 2)),
        "BLOCK_K": next_power_of_2(max(sizes.topk, 2)),
    }


def _state_config(sizes: _Sizes, states: int) -> Config:
    rule = RULES[sizes.rule]
    known = states if isinstance(states, int) else max(BLOCKS) + 1  # a symbol may be large
    block = next((columns for most, columns in BLOCKS.items() if known <= most), WIDE_BLOCK)
    constants: dict[str, Any] = {"H": sizes.H, "HV": sizes.HV, "K": sizes.K, "V": sizes.V}
    constants |= _routing_constants(sizes)
    constants |= {
        "GATE": {"none": 0, "head": 1, "scalar": 2}[rule.gate],
        "DELTA": rule.delta,
        "TIMES_DT": sizes.rule == "mamba2",
        "BK": next_power_of_2(max(sizes.K, 16)),
        "BV": min(next_power_of_2(max(sizes.V, 16)), block),
        "EVICT": "evict_first",  # a state is not read again before the next token
    }
    return Config(constants, num_warps=4, overlap=True)


def _combine_config(sizes: _Sizes) -> Config:
    constants: dict[str, Any] = {"KEYS": sizes.H * sizes.K, "HV": sizes.HV, "V": sizes.V}
    block = next_power_of_2(max(sizes.V, 16))
    heads = min(next_power_of_2(sizes.HV), max(COMBINED // block, 1))
    largest = max(sizes.H * sizes.K, sizes.HV * sizes.V)
    elements = 2 * min(next_power_of_2(max(largest, 64)), COMBINED)
    constants |= _routing_constants(sizes) | {"BH": heads, "BV": block}
    constants |= {"ELEMENTS": elements, "MOVED": elements // max(sizes.width - 1, 1)}
    return Config(constants, num_warps=4, overlap=True)


def decode_step(
    q: Tensor,
    kv: Tensor,
    router_logits: Tensor | None,
    router_indices: Tensor | None,
    router_weights: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weight: Tensor | None,
    recurrent_state: Tensor,
    conv_state: Tensor | None,
    valid: Tensor | None,
    rule: str,
    topk: int,
    shared: bool,
    scale: float,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Arguments as ``mom::decode_step_``; o ``[B, T, HV, V]``. Tokens follow one another in pairs of launches."""
    batch, tokens, key_size = q.shape
    total, value_heads, key_dim, value_dim = recurrent_state.shape[1:]
    width = 0 if conv_weight is None else conv_weight.shape[1]
    sizes = _Sizes(
        key_size // key_dim, value_heads, key_dim, value_dim, total - int(shared), topk, shared,
        kv.shape[2] == 1, width, rule,
    )  # fmt: skip
    (q_rows, q_stride), (kv_rows, kv_stride), (logits, logits_stride), (a_rows, a_stride), (b_rows, b_stride) = (
        _rows(x) for x in (q, kv, router_logits, a, b)
    )
    gate_rows, gate_stride = _rows(gate)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    indices, weights = (None if x is None else x.contiguous() for x in (router_indices, router_weights))
    A_log, dt_bias, conv_weight = (None if x is None else x.contiguous() for x in (A_log, dt_bias, conv_weight))
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    o = q.new_empty(batch, tokens, value_heads, value_dim)
    y = q.new_empty(batch, sizes.choices, value_heads, value_dim, dtype=torch.float32)
    states = batch * sizes.choices * value_heads
    state_config, combine_config = _state_config(sizes, states), _combine_config(sizes)
    state_grid = (states * cdiv(value_dim, state_config.constants["BV"]),)
    programs = cdiv(value_heads, combine_config.constants["BH"])
    if width:
        programs += sizes.choices * cdiv(2 * key_size + value_heads * value_dim, combine_config.constants["MOVED"])
    for t in range(tokens):
        launch(
            decode_state_kernel, state_grid, state_config, q_rows, kv_rows, logits, indices, weights, a_rows, b_rows,
            A_log, dt_bias, conv_weight, recurrent_state, conv_state, valid, y, t, tokens, q_stride, kv_stride,
            logits_stride, a_stride, b_stride, scale,
        )  # fmt: skip
        launch(
            decode_combine_kernel, (batch * programs,), combine_config, q_rows, kv_rows, logits, indices, weights,
            conv_state, valid, y, norm_weight, gate_rows, o, t, tokens, q_stride, kv_stride, logits_stride,
            gate_stride, eps,
        )  # fmt: skip
    return o


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """``x`` and its distance from token to token: columns of a wider product are read where they are."""
    if x is None:
        return None, 0
    inner = 1
    for axis in range(x.dim() - 1, 1, -1):
        if x.shape[axis] > 1 and x.stride(axis) != inner:
            x = x.contiguous()
            break
        inner *= x.shape[axis]
    if x.shape[1] > 1 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()
    if x.shape[1] > 1:
        return x, x.stride(1)
    return x, x.stride(0)


def _arguments(sizes: _Sizes, dtype: torch.dtype, state: torch.dtype, routing: str) -> dict[str, str | None]:
    rule, kind = RULES[sizes.rule], pointer(dtype)
    scalar, conv = rule.gate == "scalar", sizes.width > 0
    return {
        "q": kind,
        "kv": kind,
        "logits": None if routing == "custom" else "*fp32",
        "indices": None if routing == "own" else "*i64",
        "weights": "*fp32" if routing == "custom" else None,
        "a": "*fp32" if scalar else None,
        "b": "*fp32" if rule.delta else None,
        "A_log": kind if scalar else None,
        "dt_bias": kind if scalar else None,
        "conv_weight": kind if conv else None,
        "state": pointer(state),
        "conv_state": kind if conv else None,
        "valid": None,
        "y": "*fp32",
        "norm_weight": kind if conv else None,
        "gate": kind if conv else None,
        "o": kind,
        **dict.fromkeys(("t", "tokens", "q_stride", "kv_stride", "logits_stride", "a_stride", "b_stride"), "i32"),
        "gate_stride": "i32",
        "scale": "fp32",
        "eps": "fp32",
    }


def variants() -> Iterator[KernelVariant]:
    """Both kernels over dtypes, head dims, rules and ways of routing."""
    shapes = [(16, 16), (64, 64), (100, 60), (128, 128), (256, 256)]
    for dtype in KERNEL_DTYPES:
        for key, value in shapes:
            for rule in RULES:
                for states in (1, 64, 1024):
                    sizes = _Sizes(2, 4, key, value, 4, 2, True, False, 4, rule)
                    quick = rule == "gated_delta" and key == 64
                    known = _state_variant(sizes, dtype, torch.float32, "own", states, quick)
                    yield known
                    if quick:
                        yield overlapped(known)
            sizes = _Sizes(2, 4, key, value, 4, 2, True, False, 4, "gated_delta")
            yield _state_variant(sizes, dtype, torch.bfloat16, "own", 1024, False)
            known = _combine_variant(sizes, dtype, "own", key == 64)
            yield known
            if known.quick:
                yield overlapped(known)
        for routing in ("own", "given", "custom"):
            sizes = _Sizes(4, 4, 64, 64, 8, 3, False, True, 0, "delta")
            yield _state_variant(sizes, dtype, torch.float32, routing, 1, False)
            yield _combine_variant(sizes, dtype, routing, False)


def _named(kernel: Any, arguments: dict[str, str | None]) -> dict[str, str | None]:
    return {name: kind for name, kind in arguments.items() if name in kernel.arg_names}


def _state_variant(
    sizes: _Sizes, dtype: torch.dtype, state: torch.dtype, routing: str, states: int, quick: bool
) -> KernelVariant:
    config = _state_config(sizes, states)
    label = f"K={sizes.K} V={sizes.V} BV={config.constants['BV']} {dtype} state {state} {sizes.rule} {routing}"
    arguments = _named(decode_state_kernel, _arguments(sizes, dtype, state, routing))
    return variant(label, decode_state_kernel, arguments, config, quick)


def _combine_variant(sizes: _Sizes, dtype: torch.dtype, routing: str, quick: bool) -> KernelVariant:
    label = f"K={sizes.K} V={sizes.V} {dtype} {sizes.rule} {routing}"
    arguments = _named(decode_combine_kernel, _arguments(sizes, dtype, torch.float32, routing))
    return variant(label, decode_combine_kernel, arguments, _combine_config(sizes), quick)
