"""Single nodes of ``com.microsoft``, ONNX Runtime's own operators (version 1), as functions that torch traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.memory_rule import Rule

# Names of LinearAttention's update rules.
_RULES = {
    "linear": "linear",
    "retention": "gated",
    "mamba2": "gated",
    "delta": "delta",
    "gated_delta": "gated_delta",
}


def linear_attention(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The whole rule: LinearAttention."""
    batch, length, heads, value_dim = v.shape
    o, final_state = _node(
        "LinearAttention",
        (q.flatten(2), k.flatten(2), v.flatten(2), state, g, beta),
        {"update_rule": _RULES[rule.name], "q_num_heads": q.shape[2], "kv_num_heads": heads, "scale": scale},
        ((batch, length, heads * value_dim), state.shape),
    )
    return o.unflatten(2, (heads, value_dim)), final_state


def gated_delta_net(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token a sequence of a delta rule: GatedDeltaNet, the norm of q and k and the gates in it.

    Its norm divides by the root of a sum of squares without our 1e-6. q and k ``[B, h, K]``, v ``[B, hv, V]``, a and b
    ``[B, hv]`` as projected, ``state`` transposed, ``[B, hv, V, K]``; o ``[B, hv, V]``.
    """
    attributes = {"update_rule": _RULES[rule.name], "qk_l2_norm": 1, "beta_activation": "sigmoid", "scale": scale}
    if a is not None:
        attributes["gate_activation"] = "qwen"
    inputs = (q, k, v, None, a, b, state, A_log, dt_bias)
    o, final_state = _node("GatedDeltaNet", inputs, attributes, (v.shape, state.shape))
    return o, final_state


def causal_conv(x: Tensor, weight: Tensor, past: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    """A depthwise convolution over ``[B, C, T]`` behind ``past`` ``[B, C, W-1]``, and its new window."""
    y, window = _node("CausalConvWithState", (x, weight, None, past), {"activation": activation}, (x.shape, past.shape))
    return y, window


def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMSNorm over the last axis, in float32: BranchwiseRMSNorm."""
    assert len(normalized_shape) == 1 and weight is not None and eps is not None
    return _node("BranchwiseRMSNorm", (x, weight), {"epsilon": eps}, (x.shape,))[0]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm times SiLU(gate): GatedRMSNorm."""
    return _node("GatedRMSNorm", (x, weight, gate), {"epsilon": eps, "activation": "silu"}, (x.shape,))[0]


def decay_and_beta(a: Tensor, dt_bias: Tensor, A_log: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``-exp(A_log) softplus(a + dt_bias)`` and ``sigmoid(b)``, a and b ``[B, T, h]``: LinearAttentionGate."""
    decay, beta = _node("LinearAttentionGate", (a, dt_bias, -A_log.exp(), b), {}, (a.shape, b.shape))
    return decay, beta


def join_residuals(graph: Any) -> None:
    """An addition and the RMSNorm of its sum as one SkipSimplifiedLayerNormalization, in an onnx_ir graph."""
    import onnx_ir as ir

    for norm in list(graph):
        if norm.op_type != "BranchwiseRMSNorm":
            continue
        x, weight = norm.inputs[:2]
        addition = x.producer()
        if addition is None or addition.op_type != "Add":
            continue
        outputs = [ir.Value(name=old.name, shape=old.shape, type=old.type) for old in (norm.outputs[0], x)]
        joined = ir.Node(
            "com.microsoft",
            "SkipSimplifiedLayerNormalization",
            [*addition.inputs, weight],
            list(norm.attributes.values()),
            outputs=[outputs[0], ir.Value(name=""), ir.Value(name=""), outputs[1]],
            version=1,
        )
        graph.insert_before(addition, joined)
        for old, new in zip((norm.outputs[0], x), outputs, strict=True):
            ir.convenience.replace_all_uses_with(old, new)
        graph.remove([norm, addition], safe=True)


def _node(
    operator: str, inputs: Sequence[Tensor | None], attributes: Mapping[str, Any], shapes: Sequence[Sequence[Any]]
) -> Sequence[Tensor]:
    """One node; what is None at the end of its inputs it does not take."""
    while inputs[-1] is None:
        inputs = inputs[:-1]
    first = inputs[0]
    assert first is not None
    return torch.onnx.ops.symbolic_multi_out(
        f"com.microsoft::{operator}",
        tuple(inputs),
        dict(attributes),
        dtypes=(first.dtype,) * len(shapes),
        shapes=tuple(tuple(shape) for shape in shapes),
        version=1,
    )
