"""The memory rules in PyTorch, chunk by chunk: matrix products inside a chunk, a scan over the chunks of a segment.

Notation of one chunk (C rows), as in Gated DeltaNet (arXiv 2412.06464) section 3.3: G the cumulative log decay, D_ij =
exp(G_i - G_j) for i >= j, L = tril(beta_i D_ij k_i.k_j, -1), A = (I + L)^-1, P = scale tril(D q k^T), S0 and S1 the
state before and after, u = K S0, w = beta (v - exp(G) u), v_new = A w, o = scale exp(G) q S0 + P v_new,
S1 = exp(G_C) S0 + (exp(G_C - G) k)^T v_new. For the additive rules v_new = v.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import CHUNK, row_mask
from .._tensors import wide
from .rules import SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW


class _Order(NamedTuple):
    """The order of the scan. Step w advances the first ``active[w]`` of ``segments`` by one chunk each. ``chunks``
    lists the chunks step after step, so that every step works on slices."""

    segments: Tensor  # longest first
    chunks: Tensor
    active: list[int]

    def steps(self) -> list[tuple[slice, slice]]:
        """(slice of the segments, slice of the chunks) of each step."""
        ends = list(itertools.accumulate(self.active))
        return [(slice(0, count), slice(end - count, end)) for count, end in zip(self.active, ends, strict=True)]


def _order(segment_start: Tensor, segment_length: Tensor, size: int) -> _Order:
    counts = (segment_length.long() + size - 1) // size
    segments = torch.argsort(counts, descending=True, stable=True)
    counts, first = counts[segments], segment_start.long()[segments] // size
    step = torch.arange(int(counts[0]) if len(counts) else 0).unsqueeze(1)
    running = counts > step  # [steps, NS]
    return _Order(segments, (first + step)[running], running.sum(1).tolist())


def _chunk_size(key_dim: int, value_dim: int) -> int:
    """Rows of a chunk on the CPU: small heads spend their time on the C x C matrices, large ones on the state."""
    largest = max(key_dim, value_dim)
    return 16 if largest <= 32 else 32 if largest <= 96 else CHUNK


class _Chunk(NamedTuple):
    """Per-chunk quantities that need no state, ``[n, HV, C, ...]`` in scan order and compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    decay: Tensor | None  # D, lower triangular with the diagonal
    from_start: Tensor | None  # exp(G)
    to_end: Tensor | None  # exp(G_C - G)
    total: Tensor | None  # exp(G_C)


def _gather(x: Tensor, order: _Order, size: int, dtype: torch.dtype, groups: int = 1) -> Tensor:
    """Rows ``[S, h, d]`` -> ``[n, h * groups, C, d]``."""
    x = x.reshape(-1, size, *x.shape[1:]).index_select(0, order.chunks).to(dtype).transpose(1, 2)
    return x.repeat_interleave(groups, 1) if groups > 1 else x.contiguous()


def _scatter(x: Tensor, order: _Order, like: Tensor, groups: int = 1) -> Tensor:
    """``[n, h * groups, C, d]`` -> rows ``[S, h, d]`` in the dtype of ``like``, summed over the group, others zero."""
    count, heads, size, dim = x.shape
    if groups > 1:
        x = x.view(count, heads // groups, groups, size, dim).sum(2)
        heads //= groups
    out = like.new_zeros(like.shape[0] // size, size, heads, dim)
    return out.index_copy_(0, order.chunks, x.transpose(1, 2).to(out.dtype)).flatten(0, 1)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, order: _Order, size: int
) -> _Chunk:
    dtype = wide(v.dtype)
    groups = v.shape[1] // q.shape[1]
    decay = from_start = to_end = total = None
    if g is not None:
        # float64: after a strong decay (-1e4) a float32 sum would have lost the small differences that follow it.
        cumulative = _gather(g.unsqueeze(-1), order, size, torch.float64).cumsum(2)
        last = cumulative[:, :, -1:]
        above = torch.ones(size, size, dtype=torch.bool).triu_(1)
        difference = (cumulative - cumulative.transpose(2, 3)).to(dtype)
        decay = difference.masked_fill_(above, float("-inf")).exp_()
        from_start, to_end, total = (x.to(dtype).exp() for x in (cumulative, last - cumulative, last))
    return _Chunk(
        _gather(q, order, size, dtype, groups),
        _gather(k, order, size, dtype, groups),
        _gather(v, order, size, dtype),
        None if beta is None else _gather(beta.unsqueeze(-1), order, size, dtype),
        decay,
        from_start,
        to_end,
        total,
    )


def _inverse(chunk: _Chunk) -> Tensor:
    """``(I + L)^-1`` by forward substitution; its entries stay bounded where a Neumann doubling overflows."""
    assert chunk.beta is not None
    lower = (chunk.k @ chunk.k.transpose(2, 3)).mul_(chunk.beta)
    if chunk.decay is not None:
        lower *= chunk.decay
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False, unitriangular=True)


def _scores(chunk: _Chunk, scale: float) -> Tensor:
    scores = (chunk.q * scale) @ chunk.k.transpose(2, 3)
    return scores.tril_() if chunk.decay is None else scores.mul_(chunk.decay)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _add_outer(state: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """``state += alpha left^T right`` for contiguous ``[n, h, K, V]``, ``[n, h, C, K]``, ``[n, h, C, V]``."""
    state.flatten(0, 1).baddbmm_(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1), alpha=alpha)


def _scan(
    chunk: _Chunk, inverse: Tensor | None, state: Tensor, order: _Order, v_new: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the states through the chunks; ``state`` ``[NS, HV, K, V]``, in scan order, is advanced in place.

    Returns the state before each chunk ``[n, HV, K, V]`` and v_new ``[n, HV, C, V]``; a v_new that is given is used.
    """
    states = state.new_empty(chunk.k.shape[0], *state.shape[1:])
    known = v_new is not None or inverse is None
    if v_new is None:
        v_new = chunk.v if inverse is None else torch.empty_like(chunk.v)
    k_end = _times(chunk.k, chunk.to_end)
    for segments, chunks in order.steps():
        current = state[segments]
        states[chunks] = current
        if not known:
            assert inverse is not None and chunk.beta is not None
            read = _times(chunk.k[chunks] @ current, None if chunk.from_start is None else chunk.from_start[chunks])
            torch.matmul(inverse[chunks], (chunk.v[chunks] - read).mul_(chunk.beta[chunks]), out=v_new[chunks])
        if chunk.total is not None:
            current *= chunk.total[chunks]
        _add_outer(current, k_end[chunks], v_new[chunks])
    return states, v_new


def _initial(v: Tensor, key_dim: int, initial_state: Tensor | None, order: _Order) -> Tensor:
    """The state buffer of a scan, in its order."""
    dtype = wide(v.dtype)
    if initial_state is None:
        return torch.zeros(len(order.segments), v.shape[1], key_dim, v.shape[2], dtype=dtype)
    return initial_state.index_select(0, order.segments).to(dtype)


def _in_segment_order(x: Tensor, order: _Order, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    return out.index_copy_(0, order.segments, x.to(dtype))


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


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
    # The saved matrices have the layout of the kernels' chunk of 64.
    size = CHUNK if save & ~SAVE_V_NEW else _chunk_size(q.shape[2], v.shape[2])
    order = _order(segment_start, segment_length, size)
    chunk = _prepare(q, k, v, g, beta, order, size)
    inverse = None if beta is None else _inverse(chunk)
    scores = _scores(chunk, scale)
    state = _initial(v, q.shape[2], initial_state, order)
    states, v_new = _scan(chunk, inverse, state, order)
    o = _times((chunk.q * scale) @ states, chunk.from_start)
    o.flatten(0, 1).baddbmm_(scores.flatten(0, 1), v_new.flatten(0, 1))
    saved_states = _absent(v)
    if save & SAVE_STATES:
        saved_states = v.new_zeros(chunk_segment.shape[0], *states.shape[1:])
        saved_states[order.chunks] = states.to(v.dtype)
    return (
        _scatter(o, order, v),
        _in_segment_order(state, order, state.dtype if initial_state is None else initial_state.dtype),
        _scatter(inverse, order, v) if save & SAVE_INVERSE and inverse is not None else _absent(v),
        _scatter(scores, order, v) if save & SAVE_SCORES else _absent(v),
        saved_states,
        _scatter(v_new, order, v) if save & SAVE_V_NEW and beta is not None else _absent(v),
    )


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
    """Gradients of :func:`chunk_fwd`; absent ones have shape [0]. Of what was saved only v_new is used here.

    With R = dw v_new^T the gradient of L is -tril(R, -1), so the inverse itself needs no gradient. As v_new_i =
    beta_i e_i with e_i = v_i - exp(G_i) u_i - sum_j<i D_ij (k_i.k_j) v_new_j, dbeta_i = <dw_i, e_i> needs no division.
    """
    groups = v.shape[1] // q.shape[1]
    size = _chunk_size(q.shape[2], v.shape[2])
    order = _order(segment_start, segment_length, size)
    chunk = _prepare(q, k, v, g, beta, order, size)
    dtype = chunk.v.dtype
    inv = None if beta is None else _inverse(chunk)
    score = _scores(chunk, scale)
    known = _gather(v_new, order, size, dtype) if v_new.numel() else None
    before, new = _scan(chunk, inv, _initial(v, q.shape[2], initial_state, order), order, known)
    grad_o = _gather(do, order, size, dtype)

    # Reverse scan: the gradient of the state after each chunk, and dw.
    if dfinal_state is None:
        dstate = torch.zeros(len(order.segments), *before.shape[1:], dtype=dtype)
    else:
        dstate = dfinal_state.index_select(0, order.segments).to(dtype)
    dafter = torch.empty_like(before)
    q_start = _times(chunk.q * scale, chunk.from_start)
    k_end = _times(chunk.k, chunk.to_end)
    k_start = None if beta is None or chunk.beta is None else _times(chunk.k * chunk.beta, chunk.from_start)
    dw = score.transpose(2, 3) @ grad_o  # becomes the gradient of w once the state's part is added
    for segments, chunks in reversed(order.steps()):
        current = dstate[segments]
        dafter[chunks] = current
        step = dw[chunks].flatten(0, 1).baddbmm_(k_end[chunks].flatten(0, 1), current.flatten(0, 1))
        if inv is not None:
            step = inv[chunks].flatten(0, 1).transpose(1, 2) @ step
            dw[chunks].flatten(0, 1).copy_(step)
        if chunk.total is not None:
            current *= chunk.total[chunks]
        _add_outer(current, q_start[chunks], grad_o[chunks])
        if k_start is not None:
            _add_outer(current, k_start[chunks], dw[chunks], alpha=-1)

    # Chunk-parallel: everything that needs no state order.
    dscore = (grad_o @ new.transpose(2, 3)).tril_()
    dqk = _times(dscore, chunk.decay) * scale
    dq_inter = _times(grad_o @ before.transpose(2, 3), chunk.from_start).mul_(scale)
    dk_write = _times(new @ dafter.transpose(2, 3), chunk.to_end)
    dk = dqk.transpose(2, 3) @ chunk.q + dk_write
    dv, dbeta, dg = dw, _absent(v), _absent(v)
    dgate_pairs = dscore.mul_(score) if g is not None else None
    dgate_rows = (chunk.q * dq_inter).sum(-1, keepdim=True) if g is not None else None
    if beta is not None:
        assert chunk.beta is not None
        lower = _times(chunk.k @ chunk.k.transpose(2, 3), chunk.decay).tril_(-1)
        dlower = (dw @ new.transpose(2, 3)).tril_(-1).neg_()
        read = _times(chunk.k @ before, chunk.from_start)
        dbeta = _scatter((dw * (chunk.v - read - lower @ new)).sum(-1, keepdim=True), order, beta).squeeze(-1)
        dv = dw * chunk.beta
        dlower *= chunk.beta
        dgram = _times(dlower, chunk.decay)
        dk += (dgram + dgram.transpose(2, 3)) @ chunk.k
        dk -= _times(dv, chunk.from_start) @ before.transpose(2, 3)
        if dgate_pairs is not None and dgate_rows is not None:
            dgate_pairs.addcmul_(dlower, lower)
            dgate_rows -= (dv * read).sum(-1, keepdim=True)
    if g is not None:
        assert dgate_pairs is not None and dgate_rows is not None and chunk.total is not None
        write = (chunk.k * dk_write).sum(-1, keepdim=True)
        dcumulative = dgate_rows + dgate_pairs.sum(3, keepdim=True) - dgate_pairs.sum(2).unsqueeze(-1) - write
        end = (before * dafter).sum((2, 3), keepdim=True) * chunk.total + write.sum(2, keepdim=True)
        dcumulative[:, :, -1:] += end
        gate = dcumulative.flip(2).cumsum(2).flip(2)
        real = row_mask(segment_start, segment_length, chunk_segment).unsqueeze(1)
        dg = _scatter(gate, order, g).squeeze(-1) * real
    return (
        _scatter(dq_inter.add_(dqk @ chunk.k), order, q, groups),
        _scatter(dk, order, k, groups),
        _scatter(dv, order, v),
        dg,
        dbeta,
        _absent(v) if initial_state is None else _in_segment_order(dstate, order, initial_state.dtype),
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
    dtype = wide(v.dtype)
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
