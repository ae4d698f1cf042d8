"""One to eight tokens of decoding in one operator: routing, convolution, gates, memory update and read."""

from __future__ import annotations

from torch import Tensor

from .op import MAX_TOKENS, decode_step_functional, decode_step_in_place
from .reference import decode_step_reference

__all__ = ["MAX_TOKENS", "decode_step", "decode_step_", "decode_step_reference"]


def decode_step(
    q: Tensor,
    kv: Tensor,
    recurrent_state: Tensor,
    conv_state: Tensor | None = None,
    *,
    router_logits: Tensor | None = None,
    router_indices: Tensor | None = None,
    router_weights: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    valid: Tensor | None = None,
    rule: str = "gated_delta",
    topk: int = 2,
    shared: bool = True,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A Mixture-of-Memories layer between its input projections and its output norm, for a few tokens.

    Each token selects its k memories (and the shared one), advances their convolution windows and states, reads them
    and sums what it read by the router's weights, the shared memory's being 1. q, k and v pass the convolution (if
    any) and SiLU; q and k are L2-normalised per head. Every other memory stays as it is, bit for bit.

    Args:
        q: ``[B, T, H * K]`` floating point, before the convolution; T at most 8.
        kv: ``[B, T, G, H * K + HV * V]``, keys then values of each memory; G = M', or 1 where one projection serves
            all of them.
        recurrent_state: ``[B, M', HV, K, V]``, the routed memories 0 .. M - 1 and, with ``shared``, the shared one;
            float32, bfloat16, float16 or float64. Not modified.
        conv_state: ``[B, M', C, W - 1]`` with C = 2 H K + HV V: the last inputs of the convolution, oldest first,
            channels q, k, v; None without a convolution. Not modified.
        router_logits: ``[B, T, M]`` float32. The k largest are selected (ties: the lowest index) and weighted by the
            softmax over them.
        router_indices: ``[B, T, k]`` int64, different for one token: memories selected in place of the router's. One
            outside ``[0, M)``, or a repeated one, selects nothing.
        router_weights: ``[B, T, k]`` float32 with ``router_indices`` and without ``router_logits``: their weights.
        a: ``[B, T, G, HV]`` float32, decay before softplus (mamba2, gated_delta).
        b: ``[B, T, G, HV]`` float32, beta before the sigmoid (delta, gated_delta).
        A_log, dt_bias: ``[HV]``, with ``a``: ``dt = softplus(a + dt_bias)``, ``g = -exp(A_log) dt``.
        conv_weight: ``[C, W]``, with ``conv_state``.
        valid: ``[B, T]`` bool; where false the token changes no state and its output is 0.
        rule: ``linear``, ``retention``, ``mamba2``, ``delta`` or ``gated_delta``.
        topk: k.
        shared: the last memory is the shared one.
        scale: factor of the read, ``K ** -0.5`` by default.
        norm_weight: ``[V]`` in the dtype of q: RMSNorm over the values of each head of the sum.
        gate: ``[B, T, HV * V]`` in the dtype of q, with ``norm_weight``: what is normed is multiplied by SiLU(gate).
        eps: of the norm, added to the mean square.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q, the sum or (with ``norm_weight``) its norm; the new
        ``recurrent_state`` and ``conv_state`` (None without one). Not differentiable: the sequential rules
        (``recurrent_<rule>``) are.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown rule, missing or superfluous arguments.

    Source: MoM (arXiv 2502.13685) section 3.2 with the rules of its Table 1; Gated DeltaNet (arXiv 2412.06464) eq. 10.
    """
    scale = _scale(scale, recurrent_state)
    o, state, window = decode_step_functional(
        q, kv, router_logits, router_indices, router_weights, a, b, A_log, dt_bias, conv_weight, recurrent_state,
        conv_state, valid, rule, topk, shared, scale, norm_weight, gate, eps,
    )  # fmt: skip
    return o, state, None if conv_state is None else window


def decode_step_(
    q: Tensor,
    kv: Tensor,
    recurrent_state: Tensor,
    conv_state: Tensor | None = None,
    *,
    router_logits: Tensor | None = None,
    router_indices: Tensor | None = None,
    router_weights: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    valid: Tensor | None = None,
    rule: str = "gated_delta",
    topk: int = 2,
    shared: bool = True,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`decode_step` with the selected memories of ``recurrent_state`` and ``conv_state`` advanced in place.

    Args:
        q, kv, router_logits, router_indices, router_weights, a, b, A_log, dt_bias, conv_weight, valid, rule, topk, \
shared, scale, norm_weight, gate, eps: as for :func:`decode_step`.
        recurrent_state, conv_state: as for :func:`decode_step`; contiguous, overwritten.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q.

    Raises:
        ValueError: as :func:`decode_step`, and for states that are not contiguous.
        RuntimeError: an input that requires a gradient while gradients are on.

    Source: see :func:`decode_step`.
    """
    return decode_step_in_place(
        q, kv, router_logits, router_indices, router_weights, a, b, A_log, dt_bias, conv_weight, recurrent_state,
        conv_state, valid, rule, topk, shared, _scale(scale, recurrent_state), norm_weight, gate, eps,
    )  # fmt: skip


def _scale(scale: float | None, recurrent_state: Tensor) -> float:
    return recurrent_state.shape[-2] ** -0.5 if scale is None else scale
