"""The memory rules in PyTorch, chunk by chunk: matrix products inside a chunk, a scan over the chunks of a segment.

Notation of one chunk (C rows), as in Gated DeltaNet (arXiv 2412.06464) section 3.3: G the cumulative log decay, D_ij =
exp(G_i - G_j) for i >= j, L = tril(beta_i D_ij k_i.k_j, -1), A = (I + L)^-1, P = scale tril(D q k^T), S0 and S1 the
state before and after, u = K S0, w = beta (v - exp(G) u), v_new = A w, o = scale exp(G) q S0 + P v_new,
S1 = exp(G_C) S0 + (exp(G_C - G) k)^T v_new. For the additive rules v_new = v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import CHUNK, row_mask
from .rules import SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW


class _Waves(NamedTuple):
    """The scan order: ``segments[i]`` and ``chunks[i]`` are what step i updates, all of them independent."""

    segments: list[Tensor]
    chunks: list[Tensor]


def _waves(segment_start: Tensor, segment_length: Tensor) -> _Waves:
    counts = (segment_length.long() + CHUNK - 1) // CHUNK
    first = segment_start.long() // CHUNK
    order = torch.argsort(counts, descending=True, stable=True)
    counts, first = counts[order], first[order]
    segments, chunks = [], []
    for step in range(int(counts[0]) if len(counts) else 0):
        active = int((counts > step).sum())
        segments.append(order[:active])
        chunks.append(first[:active] + step)
    return _Waves(segments, chunks)


class _Chunk(NamedTuple):
    """Per-chunk quantities that need no state, ``[n, HV, C, ...]`` in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor | None  # D, lower triangular with the diagonal
    from_start: Tensor | None  # exp(G)
    to_end: Tensor | None  # exp(G_C - G)
    total: Tensor | None  # exp(G_C)


def _heads_first(x: Tensor, used: int, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """Rows ``[S, h, d]`` -> ``[used, h * groups, C, d]``."""
    x = x[: used * CHUNK].to(dtype).reshape(used, CHUNK, *x.shape[1:]).transpose(1, 2)
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def _rows(x: Tensor, rows: int, like: Tensor, groups: int = 1) -> Tensor:
    """``[used, h * groups, C, d]`` -> rows ``[S, h, d]``, summed over the group, unused rows zero."""
    used, heads, _, dim = x.shape
    if groups > 1:
        x = x.view(used, heads // groups, groups, CHUNK, dim).sum(2)
        heads //= groups
    out = like.new_zeros(rows, heads, dim)
    out[: used * CHUNK].view(used, CHUNK, heads, dim).copy_(x.transpose(1, 2))
    return out


def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, used: int) -> _Chunk:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    groups = v.shape[1] // q.shape[1]
    decay = from_start = to_end = total = None
    if g is not None:
        # float64: after a strong decay (-1e4) a float32 sum would have lost the small differences that follow it.
        cumulative = _heads_first(g.unsqueeze(-1).double(), used, torch.float64).cumsum(2)
        last = cumulative[:, :, -1:]
        causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril_()
        difference = (cumulative - cumulative.transpose(2, 3)).to(dtype)
        decay = difference.masked_fill_(~causal, float("-inf")).exp_()
        from_start, to_end, total = (x.to(dtype).exp() for x in (cumulative, last - cumulative, last))
    return _Chunk(
        _heads_first(q, used, dtype, groups),
        _heads_first(k, used, dtype, groups),
        _heads_first(v, used, dtype),
        None if beta is None else _heads_first(beta.unsqueeze(-1), used, dtype),
        decay,
        from_start,
        to_end,
        total,
    )


def _inverse(chunk: _Chunk) -> Tensor:
    """``(I + L)^-1`` by forward substitution; its entries stay bounded where a Neumann doubling overflows."""
    assert chunk.beta is not None
    lower = (chunk.k @ chunk.k.transpose(2, 3)) * chunk.beta
    if chunk.decay is not None:
        lower *= chunk.decay
    identity = torch.eye(CHUNK, dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False, unitriangular=True)


def _scores(chunk: _Chunk, scale: float) -> Tensor:
    scores = (chunk.q @ chunk.k.transpose(2, 3)) * scale
    return scores.tril_() if chunk.decay is None else scores.mul_(chunk.decay)


def _scale_by(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _scan(chunk: _Chunk, inverse: Tensor | None, state: Tensor, waves: _Waves) -> tuple[Tensor, Tensor]:
    """Run the states through the chunks; ``state`` ``[NS, HV, K, V]`` is advanced in place.

    Returns the state before each chunk ``[used, HV, K, V]`` and v_new ``[used, HV, C, V]``.
    """
    used, heads, _, key_dim = chunk.k.shape
    states = state.new_empty(used, heads, key_dim, chunk.v.shape[-1])
    v_new = chunk.v if inverse is None else torch.empty_like(chunk.v)
    for segments, chunks in zip(*waves, strict=True):
        before = state[segments]
        states[chunks] = before
        k = chunk.k[chunks]
        update = chunk.v[chunks]
        if inverse is not None:
            assert chunk.beta is not None
            read = k @ before
            if chunk.from_start is not None:
                read *= chunk.from_start[chunks]
            update = inverse[chunks] @ (update.sub_(read).mul_(chunk.beta[chunks]))
            v_new[chunks] = update
        if chunk.total is not None and chunk.to_end is not None:
            before *= chunk.total[chunks]
            k *= chunk.to_end[chunks]
        before.flatten(0, 1).baddbmm_(k.flatten(0, 1).transpose(1, 2), update.flatten(0, 1))
        state[segments] = before
    return states, v_new


def _state_buffer(v: Tensor, key_dim: int, initial_state: Tensor | None, num_segments: int) -> Tensor:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if initial_state is None:
        return torch.zeros(num_segments, v.shape[1], key_dim, v.shape[2], dtype=dtype)
    return initial_state.to(dtype, copy=True)


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _used_chunks(chunk_segment: Tensor) -> int:
    used = (chunk_segment >= 0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    scale: float,
    save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunked forward on aligned rows; shapes and results as ``mom::chunk_gated_delta_rule`` (see op.py)."""
    rows, used = q.shape[0], _used_chunks(chunk_segment)
    chunk = _prepare(q, k, v, g, beta, used)
    inverse = None if beta is None else _inverse(chunk)
    scores = _scores(chunk, scale)
    state = _state_buffer(v, q.shape[2], initial_state, segment_start.shape[0])
    states, v_new = _scan(chunk, inverse, state, _waves(segment_start, segment_length))
    o = _scale_by(chunk.q @ states, chunk.from_start).mul_(scale) + scores @ v_new
    final_state = state if initial_state is None else state.to(initial_state.dtype)
    return (
        _rows(o, rows, v),
        final_state,
        _rows(inverse, rows, v) if save & SAVE_INVERSE and inverse is not None else _absent(v),
        _rows(scores, rows, v) if save & SAVE_SCORES else _absent(v),
        _pad_chunks(states.to(v.dtype), chunk_segment.shape[0]) if save & SAVE_STATES else _absent(v),
        _rows(v_new, rows, v) if save & SAVE_V_NEW and beta is not None else _absent(v),
    )


def _pad_chunks(states: Tensor, chunks: int) -> Tensor:
    if states.shape[0] == chunks:
        return states
    return torch.cat([states, states.new_zeros(chunks - states.shape[0], *states.shape[1:])])


def chunk_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
    inverse: Tensor,
    scores: Tensor,
    states: Tensor,
    v_new: Tensor,
    do: Tensor,
    dfinal_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_fwd`; absent ones and absent saved tensors have shape [0].

    With R = dw v_new^T the gradient of L is -tril(R, -1), so the inverse itself needs no gradient. As v_new_i =
    beta_i e_i with e_i = v_i - exp(G_i) u_i - sum_j<i D_ij (k_i.k_j) v_new_j, dbeta_i = <dw_i, e_i> needs no division.
    """
    rows, used = q.shape[0], _used_chunks(chunk_segment)
    groups = v.shape[1] // q.shape[1]
    chunk = _prepare(q, k, v, g, beta, used)
    dtype = chunk.v.dtype
    waves = _waves(segment_start, segment_length)
    inv: Tensor | None = None
    if beta is not None:
        inv = _heads_first(inverse, used, dtype) if inverse.numel() else _inverse(chunk)
    score = _heads_first(scores, used, dtype) if scores.numel() else _scores(chunk, scale)
    have_v_new = beta is None or v_new.numel() > 0
    if states.numel() and have_v_new:
        before = states[:used].to(dtype)
        new = chunk.v if beta is None else _heads_first(v_new, used, dtype)
    else:
        before, new = _scan(chunk, inv, _state_buffer(v, q.shape[2], initial_state, segment_start.shape[0]), waves)
    grad_o = _heads_first(do, used, dtype)

    # Reverse scan: the gradient of the state after each chunk, and dw.
    if dfinal_state is None:
        dstate = torch.zeros(segment_start.shape[0], *before.shape[1:], dtype=dtype)
    else:
        dstate = dfinal_state.to(dtype, copy=True)
    dafter = torch.empty_like(before)
    k_end = _scale_by(chunk.k, chunk.to_end)
    dnew = score.transpose(2, 3) @ grad_o
    dstate_o = (_scale_by(chunk.q, chunk.from_start).transpose(2, 3) @ grad_o).mul_(scale)
    dw = torch.empty_like(dnew)
    for segments, chunks in zip(reversed(waves.segments), reversed(waves.chunks), strict=True):
        after = dstate[segments]
        dafter[chunks] = after
        step = dnew[chunks] + k_end[chunks] @ after
        if inv is not None:
            step = inv[chunks].transpose(2, 3) @ step
        dw[chunks] = step
        grad = _scale_by(after, None if chunk.total is None else chunk.total[chunks]) + dstate_o[chunks]
        if beta is not None:
            assert chunk.beta is not None
            du = step * chunk.beta[chunks]
            if chunk.from_start is not None:
                du *= chunk.from_start[chunks]
            grad -= chunk.k[chunks].transpose(2, 3) @ du
        dstate[segments] = grad

    # Chunk-parallel: everything that needs no state order.
    dscore = (grad_o @ new.transpose(2, 3)).tril_()
    dqk = _scale_by(dscore, chunk.decay) * scale
    o_inter = grad_o @ before.transpose(2, 3)
    dq_inter = _scale_by(o_inter, chunk.from_start) * scale
    dq = dq_inter + dqk @ chunk.k
    dk_write = _scale_by(new @ dafter.transpose(2, 3), chunk.to_end)
    dk = dqk.transpose(2, 3) @ chunk.q + dk_write
    dv = dw
    dbeta = None
    dgate_pairs = dscore * score if g is not None else None
    dgate_rows = (chunk.q * dq_inter).sum(-1, keepdim=True) if g is not None else None
    if beta is not None:
        assert chunk.beta is not None
        gram = chunk.k @ chunk.k.transpose(2, 3)
        lower = _scale_by(gram, chunk.decay).tril_(-1)
        dlower = (dw @ new.transpose(2, 3)).tril_(-1).neg_()
        read = _scale_by(chunk.k @ before, chunk.from_start)
        dbeta = (dw * (chunk.v - read - lower @ new)).sum(-1, keepdim=True)
        dv = dw * chunk.beta
        dgram = _scale_by(dlower * chunk.beta, chunk.decay)
        dk += (dgram + dgram.transpose(2, 3)) @ chunk.k - _scale_by(dv, chunk.from_start) @ before.transpose(2, 3)
        if dgate_pairs is not None and dgate_rows is not None:
            dgate_pairs += dlower * lower * chunk.beta
            dgate_rows -= (dv * read).sum(-1, keepdim=True)
    dg = _absent(v)
    if g is not None:
        assert dgate_pairs is not None and dgate_rows is not None and chunk.total is not None
        write = (chunk.k * dk_write).sum(-1, keepdim=True)
        dcumulative = dgate_rows + dgate_pairs.sum(3, keepdim=True) - dgate_pairs.sum(2).unsqueeze(-1) - write
        end = (before * dafter).sum((2, 3), keepdim=True) * chunk.total + write.sum(2, keepdim=True)
        dcumulative[:, :, -1:] += end
        gate = dcumulative.flip(2).cumsum(2).flip(2)
        dg = _rows(gate, rows, g).squeeze(-1) * row_mask(segment_start, segment_length, chunk_segment).unsqueeze(-1)
    return (
        _rows(dq, rows, q, groups),
        _rows(dk, rows, k, groups),
        _rows(dv, rows, v),
        dg,
        _absent(v) if dbeta is None or beta is None else _rows(dbeta, rows, beta).squeeze(-1),
        _absent(v) if initial_state is None else dstate.to(initial_state.dtype),
    )


def recurrent_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:
    """Sequential form on ``[B, T, H, K]``; ``state`` ``[P, HV, K, V]`` is advanced in place. One token is a direct
    step, more go through the chunks."""
    batch, length = (q.shape[0], q.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, q.shape[1])
    rows = None
    if state_indices is not None:
        valid = (state_indices >= 0) & (state_indices < state.shape[0])
        rows = state_indices.clamp(0, max(state.shape[0] - 1, 0))
        selected = state[rows]
    else:
        valid = None
        selected = state
    if cu_seqlens is None and length == 1:
        o, after = _step(q[:, 0], k[:, 0], v[:, 0], _first(g), _first(beta), selected, scale)
        o = o.unsqueeze(1)
    else:
        tables = segment_tables(batch, length, cu_seqlens)
        flat = [None if x is None else _to_rows(x, tables) for x in (q, k, v, g, beta)]
        assert flat[0] is not None and flat[1] is not None and flat[2] is not None
        o_rows, after, *_ = chunk_fwd(
            flat[0], flat[1], flat[2], flat[3], flat[4], selected, *tables.segments, scale=scale, save=0
        )
        o = o_rows.new_zeros(q.shape[0] * length, *o_rows.shape[1:])
        o[tables.token] = o_rows[tables.row]
        o = o.view(q.shape[0], length, *o_rows.shape[1:])
    if valid is None:
        state.copy_(after)
        return o.to(v.dtype)
    assert rows is not None
    state[rows[valid]] = after[valid].to(state.dtype)
    if cu_seqlens is None:
        o = o * valid.view(-1, 1, 1, 1)
    else:
        token_valid = torch.zeros(length, dtype=torch.bool)
        token_valid[tables.token] = valid[tables.sequence]
        o = o * token_valid.view(1, -1, 1, 1)
    return o.to(v.dtype)


def _first(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:, 0]


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: q, k ``[B, H, K]``, v ``[B, HV, V]``, state ``[B, HV, K, V]``."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    groups = v.shape[1] // q.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    after = state.to(dtype, copy=True)
    if g is not None:
        after *= g.to(dtype).exp()[..., None, None]
    update = v
    if beta is not None:
        update = beta.to(dtype).unsqueeze(-1) * (v - (k.unsqueeze(-2) @ after).squeeze(-2))
    after += k.unsqueeze(-1) * update.unsqueeze(-2)
    return (q.unsqueeze(-2) @ after).squeeze(-2) * scale, after


class Tables(NamedTuple):
    """How dense tokens lie in aligned rows (CPU only: built from host values)."""

    segments: tuple[Tensor, Tensor, Tensor]  # segment_start, segment_length, chunk_segment
    token: Tensor  # flattened token of each valid row
    row: Tensor  # that row
    sequence: Tensor  # its sequence
    rows: int


def segment_tables(batch: int, length: int, cu_seqlens: Tensor | None) -> Tables:
    """Tables of ``batch`` sequences of ``length`` tokens, or of the documents of ``cu_seqlens``."""
    bounds = torch.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens.long().clamp(0, length)
    start, lengths = bounds[:-1], (bounds[1:] - bounds[:-1]).clamp(min=0)
    chunks = (lengths + CHUNK - 1) // CHUNK
    segment_start = (chunks.cumsum(0) - chunks) * CHUNK
    sequence = torch.repeat_interleave(torch.arange(batch), lengths)
    position = torch.arange(len(sequence)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    chunk_segment = torch.repeat_interleave(torch.arange(batch), chunks)
    return Tables(
        (segment_start.int(), lengths.int(), chunk_segment.int()),
        start[sequence] + position,
        segment_start[sequence] + position,
        sequence,
        int(chunks.sum()) * CHUNK,
    )


def _to_rows(x: Tensor, tables: Tables) -> Tensor:
    flat = x.flatten(0, 1)
    rows = flat.new_zeros(tables.rows, *flat.shape[1:])
    rows[tables.row] = flat[tables.token]
    return rows
