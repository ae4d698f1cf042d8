"""Triton kernel of the sequential form: one pass over the tokens with the state in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_fwd import block_of


@triton.jit(do_not_specialize=["tokens", "pool", "scale"])
def recurrent_kernel(
    q, k, v, g, beta, state, state_indices, cu_seqlens, o, tokens, pool, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """One sequence, value head and block of V; BK covers K. The state is advanced in place."""
    pid, block = block_of(tl.cdiv(V, BV))
    sequence, head = (pid // HV).to(tl.int64), pid % HV
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    if cu_seqlens is None:
        begin = sequence * tokens
        end = begin + tokens
    else:
        # Values on a GPU are not checked by the host, so they must not lead outside the tensors.
        limit = tokens.to(tl.int64)
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0), limit)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), 0), limit)
    if state_indices is None:
        entry = sequence
    else:
        entry = tl.load(state_indices + sequence).to(tl.int64)
    if (entry < 0) | (entry >= pool):
        for t in range(0, (end - begin).to(tl.int32)):
            row = ((begin + t) * HV + head) * V
            tl.store(o + row + value, tl.full([BV], 0.0, dtype=tl.float32).to(o.dtype.element_ty), mask=value < V)
        return
    pointers = state + (entry * HV + head) * K * V + key[:, None] * V + value[None, :]
    mask = (key[:, None] < K) & (value[None, :] < V)
    s = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for t in range(0, (end - begin).to(tl.int32)):
        token = begin + t
        source = (token * H + head // (HV // H)) * K
        target = (token * HV + head) * V
        q_row = tl.load(q + source + key, mask=key < K, other=0.0).to(tl.float32)
        k_row = tl.load(k + source + key, mask=key < K, other=0.0).to(tl.float32)
        update = tl.load(v + target + value, mask=value < V, other=0.0).to(tl.float32)
        if HAS_GATE:
            s *= tl.exp(tl.load(g + token * HV + head).to(tl.float32))
        if HAS_DELTA:
            rate = tl.load(beta + token * HV + head).to(tl.float32)
            update = rate * (update - tl.sum(s * k_row[:, None], 0))
        s += k_row[:, None] * update[None, :]
        out = scale * tl.sum(s * q_row[:, None], 0)
        tl.store(o + target + value, out.to(o.dtype.element_ty), mask=value < V)
    tl.store(pointers, s.to(state.dtype.element_ty), mask=mask)
