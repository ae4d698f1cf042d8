"""The memory rules: linear attention, RetNet, Mamba-2, DeltaNet and Gated DeltaNet, chunked and sequential.

Every function here computes ``S_t = exp(g_t) S_{t-1} + k_t u_t^T`` and ``o_t = scale S_t^T q_t``, with ``u_t = v_t``
for the additive rules and ``u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)`` for the delta rules. The chunked functions
are for training and prefill, the sequential ones for decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_rank
from .._layout import CHUNK
from .._triton import on_gpu
from ..combine import gather_tokens
from ..dispatch import sequence_plan
from ..permute import permute
from .op import CHUNK_OPS, RECURRENT_OPS
from .reference import recurrence_reference, segments_reference
from .rules import RULES, SAVE_INVERSE, SAVE_SCORES, SAVE_V_NEW, Rule

__all__ = [
    "RULES",
    "Rule",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_linear_attn",
    "chunk_mamba2",
    "chunk_retention",
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
    "chunk_rows",
    "l2_norm",
    "recurrence_reference",
    "recurrent",
    "segments_reference",
]


def l2_norm(x: Tensor) -> Tensor:
    """``x rsqrt(sum x^2 + 1e-6)`` over the last axis, in float32 (float64 for float64), returned in the dtype of x."""
    value = x if x.dtype == torch.float64 else x.float()
    # As an RMSNorm with a constant weight, which graph compilers know as one operation. The factor keeps its 1e-6:
    # that of the mean would be below what ONNX optimizers take for zero.
    size = x.shape[-1]
    value = value * size**0.5
    weight = torch.full((size,), size**-0.5, dtype=value.dtype, device=x.device)
    return (value / torch.sqrt(value.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def _save(*tensors: Tensor | None) -> int:
    """What the forward keeps: v_new, on a GPU the two small matrices as well; nothing in inference."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return 0
    q = tensors[0]
    return SAVE_V_NEW | SAVE_INVERSE | SAVE_SCORES if q is not None and on_gpu(q) else SAVE_V_NEW


def chunk_rows(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    segments: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """A chunked rule on rows already placed by a dispatch plan; pad rows must be zero in every argument.

    Args:
        rule: name in ``RULES``.
        q, k: ``[S, H, K]``. v: ``[S, HV, V]``.
        g, beta: ``[S, HV]`` (retention: g ``[HV]``), None where the rule has none.
        scale: factor of the read.
        initial_state: ``[N * M', HV, K, V]`` or None for zeros.
        segments: the tables of the rows, ``DispatchPlan.segments``.

    Returns:
        ``o`` ``[S, HV, V]`` and the final state ``[N * M', HV, K, V]``; empty segments keep their state bit for bit.
    """
    extra = [x for x in (g, beta) if x is not None]
    save = _save(q, k, v, g, beta, initial_state)
    o, final_state, *_ = CHUNK_OPS[rule](q, k, v, *extra, initial_state, *segments, scale, save)
    return o, final_state


def recurrent(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of a rule by its name in ``RULES``; arguments as the ``recurrent_*`` functions."""
    extra = [x for x in (g, beta) if x is not None]
    return RECURRENT_OPS[rule][0](q, k, v, *extra, initial_state, state_indices, cu_seqlens, scale)


def _recurrent_(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"recurrent_{RULES[rule].op}_ must run without gradients, got grad mode enabled; wrap the call in "
            f"torch.no_grad(), or use recurrent_{RULES[rule].op}, which leaves its state unchanged"
        )
    extra = [x for x in (g, beta) if x is not None]
    return RECURRENT_OPS[rule][1](q, k, v, *extra, state, state_indices, cu_seqlens, _scale(q, scale))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _chunk(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[Tensor, Tensor]:
    check_rank("q", q, "[B, T, H, K]")
    check_rank("v", v, "[B, T, HV, V]")
    batch, length = q.shape[:2]
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"q must have batch size 1 with cu_seqlens, got {batch}; flatten the documents")
    if use_qk_l2norm_in_kernel:
        q, k = l2_norm(q), l2_norm(k)
    # Whole chunks lie in the tokens as they are; a symbolic length would have to be guarded for it.
    whole = cu_seqlens is None and isinstance(length, int) and length > 0 and length % CHUNK == 0
    plan = None if whole else sequence_plan(batch, length, cu_seqlens, q.device)

    def place(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() == 1:
            return x
        x = x.flatten(0, 1)
        return x if plan is None else permute(x.flatten(1), plan).unflatten(1, x.shape[1:])

    rows = [place(x) for x in (q, k, v, g, beta)]
    assert rows[0] is not None and rows[1] is not None and rows[2] is not None
    segments = _whole_segments(batch, length, q.device) if plan is None else plan.segments
    o, final_state = chunk_rows(
        rule, rows[0], rows[1], rows[2], rows[3], rows[4], _scale(q, scale), initial_state, segments
    )
    o = o if plan is None else gather_tokens(o, plan)
    return o.view(batch, length, *v.shape[2:]), final_state


def _whole_segments(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The segments of sequences of whole chunks: row t is token t."""
    number = torch.arange(batch, dtype=torch.int32, device=device)
    chunk_segment = number.unsqueeze(1).expand(batch, length // CHUNK).flatten()
    return number * length, torch.full_like(number, length), chunk_segment


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention: ``S_t = S_{t-1} + k_t v_t^T``.

    Chunked: matrix products over 64 tokens, then a scan over the chunks.

    Args:
        q, k: ``[B, T, H, K]`` float32, bfloat16, float16 (or float64).
        v: ``[B, T, HV, V]``, HV a multiple of H.
        scale: factor of the read; None: K^-1/2.
        initial_state: ``[N, HV, K, V]``, any floating dtype; None: zeros in float32. Never modified.
        cu_seqlens: ``[N+1]`` int boundaries of documents packed into ``[1, T]``; N = B without it.
        use_qk_l2norm_in_kernel: normalise q and k with :func:`l2_norm` first.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v and the final state ``[N, HV, K, V]``; both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: Linear attention (arXiv 2006.16236) equations 18 to 20, without feature map and normaliser.
    """
    return _chunk("linear", q, k, v, None, None, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of :func:`chunk_linear_attn`, for one or a few tokens.

    Args:
        q, k, v, scale, cu_seqlens: as there.
        initial_state: ``[P, HV, K, V]``; without ``state_indices`` P = N.
        state_indices: ``[N]`` int64: sequence n reads and advances state ``state_indices[n]``; -1 skips it. The states
            that are not named stay bit-identical.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the states ``[P, HV, K, V]`` after the tokens; the argument is never modified.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a repeated state index.

    Source: Linear attention (arXiv 2006.16236) equations 18 to 20, without feature map and normaliser.
    """
    return recurrent("linear", q, k, v, None, None, _scale(q, scale), initial_state, state_indices, cu_seqlens)


def recurrent_linear_attn_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`recurrent_linear_attn` that advances ``state`` in place and returns o alone.

    Raises:
        RuntimeError: grad mode is enabled.

    Source: Linear attention (arXiv 2006.16236) equations 18 to 20, without feature map and normaliser.
    """
    return _recurrent_("linear", q, k, v, None, None, scale, state, state_indices, cu_seqlens)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Retention: a constant decay per head, ``S_t = exp(g_h) S_{t-1} + k_t v_t^T``.

    Chunked: matrix products over 64 tokens, then a scan over the chunks.

    Args:
        q, k: ``[B, T, H, K]`` float32, bfloat16, float16 (or float64).
        v: ``[B, T, HV, V]``, HV a multiple of H.
        g: ``[HV]`` float32 log decay (natural) of each head, <= 0.
        scale: factor of the read; None: K^-1/2.
        initial_state: ``[N, HV, K, V]``, any floating dtype; None: zeros in float32. Never modified.
        cu_seqlens: ``[N+1]`` int boundaries of documents packed into ``[1, T]``; N = B without it.
        use_qk_l2norm_in_kernel: normalise q and k with :func:`l2_norm` first.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v and the final state ``[N, HV, K, V]``; both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: RetNet (arXiv 2307.08621) equations 6 and 7; Lightning Attention (arXiv 2401.04658).
    """
    return _chunk("retention", q, k, v, g, None, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of :func:`chunk_retention`, for one or a few tokens.

    Args:
        q, k, v, g, scale, cu_seqlens: as there.
        initial_state: ``[P, HV, K, V]``; without ``state_indices`` P = N.
        state_indices: ``[N]`` int64: sequence n reads and advances state ``state_indices[n]``; -1 skips it. The states
            that are not named stay bit-identical.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the states ``[P, HV, K, V]`` after the tokens; the argument is never modified.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a repeated state index.

    Source: RetNet (arXiv 2307.08621) equations 6 and 7; Lightning Attention (arXiv 2401.04658).
    """
    return recurrent("retention", q, k, v, g, None, _scale(q, scale), initial_state, state_indices, cu_seqlens)


def recurrent_retention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`recurrent_retention` that advances ``state`` in place and returns o alone.

    Raises:
        RuntimeError: grad mode is enabled.

    Source: RetNet (arXiv 2307.08621) equations 6 and 7; Lightning Attention (arXiv 2401.04658).
    """
    return _recurrent_("retention", q, k, v, g, None, scale, state, state_indices, cu_seqlens)


def chunk_mamba2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba-2 (SSD, scalar-gated linear attention): ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, v already multiplied by dt.

    Chunked: matrix products over 64 tokens, then a scan over the chunks.

    Args:
        q, k: ``[B, T, H, K]`` float32, bfloat16, float16 (or float64).
        v: ``[B, T, HV, V]``, HV a multiple of H.
        g: ``[B, T, HV]`` float32 log decay (natural), <= 0.
        scale: factor of the read; None: K^-1/2.
        initial_state: ``[N, HV, K, V]``, any floating dtype; None: zeros in float32. Never modified.
        cu_seqlens: ``[N+1]`` int boundaries of documents packed into ``[1, T]``; N = B without it.
        use_qk_l2norm_in_kernel: normalise q and k with :func:`l2_norm` first.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v and the final state ``[N, HV, K, V]``; both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: Mamba-2 (arXiv 2405.21060) section 3; q, k, v are C, B and dt x.
    """
    return _chunk("mamba2", q, k, v, g, None, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def recurrent_mamba2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of :func:`chunk_mamba2`, for one or a few tokens.

    Args:
        q, k, v, g, scale, cu_seqlens: as there.
        initial_state: ``[P, HV, K, V]``; without ``state_indices`` P = N.
        state_indices: ``[N]`` int64: sequence n reads and advances state ``state_indices[n]``; -1 skips it. The states
            that are not named stay bit-identical.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the states ``[P, HV, K, V]`` after the tokens; the argument is never modified.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a repeated state index.

    Source: Mamba-2 (arXiv 2405.21060) section 3; q, k, v are C, B and dt x.
    """
    return recurrent("mamba2", q, k, v, g, None, _scale(q, scale), initial_state, state_indices, cu_seqlens)


def recurrent_mamba2_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`recurrent_mamba2` that advances ``state`` in place and returns o alone.

    Raises:
        RuntimeError: grad mode is enabled.

    Source: Mamba-2 (arXiv 2405.21060) section 3; q, k, v are C, B and dt x.
    """
    return _recurrent_("mamba2", q, k, v, g, None, scale, state, state_indices, cu_seqlens)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """DeltaNet: ``S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T``.

    Chunked: matrix products over 64 tokens, then a scan over the chunks.

    Args:
        q, k: ``[B, T, H, K]`` float32, bfloat16, float16 (or float64).
        v: ``[B, T, HV, V]``, HV a multiple of H.
        beta: ``[B, T, HV]`` write strength, in [0, 1].
        scale: factor of the read; None: K^-1/2.
        initial_state: ``[N, HV, K, V]``, any floating dtype; None: zeros in float32. Never modified.
        cu_seqlens: ``[N+1]`` int boundaries of documents packed into ``[1, T]``; N = B without it.
        use_qk_l2norm_in_kernel: normalise q and k with :func:`l2_norm` first.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v and the final state ``[N, HV, K, V]``; both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: DeltaNet (arXiv 2406.06484) equation 3 and section 3.
    """
    return _chunk("delta", q, k, v, None, beta, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of :func:`chunk_delta_rule`, for one or a few tokens.

    Args:
        q, k, v, beta, scale, cu_seqlens: as there.
        initial_state: ``[P, HV, K, V]``; without ``state_indices`` P = N.
        state_indices: ``[N]`` int64: sequence n reads and advances state ``state_indices[n]``; -1 skips it. The states
            that are not named stay bit-identical.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the states ``[P, HV, K, V]`` after the tokens; the argument is never modified.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a repeated state index.

    Source: DeltaNet (arXiv 2406.06484) equation 3 and section 3.
    """
    return recurrent("delta", q, k, v, None, beta, _scale(q, scale), initial_state, state_indices, cu_seqlens)


def recurrent_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`recurrent_delta_rule` that advances ``state`` in place and returns o alone.

    Raises:
        RuntimeError: grad mode is enabled.

    Source: DeltaNet (arXiv 2406.06484) equation 3 and section 3.
    """
    return _recurrent_("delta", q, k, v, None, beta, scale, state, state_indices, cu_seqlens)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet, MoM's default: ``S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T``.

    Chunked: matrix products over 64 tokens, then a scan over the chunks.

    Args:
        q, k: ``[B, T, H, K]`` float32, bfloat16, float16 (or float64).
        v: ``[B, T, HV, V]``, HV a multiple of H.
        g: ``[B, T, HV]`` float32 log decay (natural), <= 0.
        beta: ``[B, T, HV]`` write strength, in [0, 1].
        scale: factor of the read; None: K^-1/2.
        initial_state: ``[N, HV, K, V]``, any floating dtype; None: zeros in float32. Never modified.
        cu_seqlens: ``[N+1]`` int boundaries of documents packed into ``[1, T]``; N = B without it.
        use_qk_l2norm_in_kernel: normalise q and k with :func:`l2_norm` first.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v and the final state ``[N, HV, K, V]``; both carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: Gated DeltaNet (arXiv 2412.06464) equation 10; MoM (arXiv 2502.13685) Table 1.
    """
    return _chunk("gated_delta", q, k, v, g, beta, scale, initial_state, cu_seqlens, use_qk_l2norm_in_kernel)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sequential form of :func:`chunk_gated_delta_rule`, for one or a few tokens.

    Args:
        q, k, v, g, beta, scale, cu_seqlens: as there.
        initial_state: ``[P, HV, K, V]``; without ``state_indices`` P = N.
        state_indices: ``[N]`` int64: sequence n reads and advances state ``state_indices[n]``; -1 skips it. The states
            that are not named stay bit-identical.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the states ``[P, HV, K, V]`` after the tokens; the argument is never modified.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a repeated state index.

    Source: Gated DeltaNet (arXiv 2412.06464) equation 10; MoM (arXiv 2502.13685) Table 1.
    """
    return recurrent("gated_delta", q, k, v, g, beta, _scale(q, scale), initial_state, state_indices, cu_seqlens)


def recurrent_gated_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`recurrent_gated_delta_rule` that advances ``state`` in place and returns o alone.

    Raises:
        RuntimeError: grad mode is enabled.

    Source: Gated DeltaNet (arXiv 2412.06464) equation 10; MoM (arXiv 2502.13685) Table 1.
    """
    return _recurrent_("gated_delta", q, k, v, g, beta, scale, state, state_indices, cu_seqlens)
