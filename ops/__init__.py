"""Operators of Mixture-of-Memories: ``torch.ops.mom.*`` and the functions over them."""

from __future__ import annotations

if __name__ != "mom_compile.ops":
    raise ImportError(
        f"import mom_compile.ops, not {__name__}: a second copy of this package would register every operator twice"
    )

from ._layout import CHUNK
from .combine import combine
from .combine_norm import combine_norm
from .conv_qkv import conv_qkv
from .decode_linear import decode_linear, decode_linear_
from .decode_step import decode_step, decode_step_
from .dispatch import DispatchPlan, dispatch
from .gate_rows import gate_rows
from .gated_rms_norm import gated_rms_norm
from .grouped_linear import grouped_linear
from .linear_cross_entropy import linear_cross_entropy
from .memory_rule import (
    RULES,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_linear_attn,
    chunk_mamba2,
    chunk_retention,
    l2_norm,
    recurrent_delta_rule,
    recurrent_delta_rule_,
    recurrent_gated_delta_rule,
    recurrent_gated_delta_rule_,
    recurrent_linear_attn,
    recurrent_linear_attn_,
    recurrent_mamba2,
    recurrent_mamba2_,
    recurrent_retention,
    recurrent_retention_,
)
from .permute import permute
from .route import route
from .short_conv import short_conv
from .small_linear import small_linear

__all__ = [
    "CHUNK",
    "RULES",
    "DispatchPlan",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_linear_attn",
    "chunk_mamba2",
    "chunk_retention",
    "combine",
    "combine_norm",
    "conv_qkv",
    "decode_linear",
    "decode_linear_",
    "decode_step",
    "decode_step_",
    "dispatch",
    "gate_rows",
    "gated_rms_norm",
    "grouped_linear",
    "l2_norm",
    "linear_cross_entropy",
    "permute",
    "recurrent_delta_rule",
    "recurrent_delta_rule_",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_",
    "recurrent_linear_attn",
    "recurrent_linear_attn_",
    "recurrent_mamba2",
    "recurrent_mamba2_",
    "recurrent_retention",
    "recurrent_retention_",
    "route",
    "short_conv",
    "small_linear",
]
