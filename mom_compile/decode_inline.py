"""The decode operators as plain PyTorch, which torch.compile sees through and fuses on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ops.decode_linear import cpu as _linear
from .ops.decode_step import cpu as _step


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    small_weight: Tensor | None = None,
    norm: bool = False,
    swiglu: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`mom_compile.ops.decode_linear`."""
    y, small = _linear.decode_linear(x, weight, norm_weight, small_weight, norm, swiglu, eps)
    return y, None if small_weight is None else small


def decode_linear_(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """As :func:`mom_compile.ops.decode_linear_`."""
    _linear.decode_linear(x, weight, None, None, False, False, 0.0, residual)


def decode_step_(
    q: Tensor,
    kv: Tensor,
    recurrent_state: Tensor,
    conv_state: Tensor | None = None,
    *,
    router_logits: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    conv_weight: Tensor | None,
    **rest: Any,
) -> Tensor:
    """As :func:`mom_compile.ops.decode_step_` with the router's own choice."""
    return _step.decode_step(
        q, kv, router_logits, None, None, a, b, A_log, dt_bias, conv_weight, recurrent_state, conv_state, None, **rest
    )  # fmt: skip
