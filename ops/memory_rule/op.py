"""Registration of the memory rules: ``mom::chunk_<rule>``, ``mom::recurrent_<rule>`` and their backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, check_dtype, check_rank, check_same_device, check_shape
from .._layout import CHUNK, check_segments, row_mask
from .._library import register_op
from .._tensors import contiguous, wide
from .._triton import LazyLaunch, on_gpu
from ..dispatch import sequence_plan
from ..permute.op import permute, permute_bwd
from . import cpu
from .rules import RULES, SAVE_INVERSE, SAVE_SCORES, SAVE_STATES, SAVE_V_NEW, Rule

launch = LazyLaunch(__package__ or "")

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _state_dtype(v: Tensor, initial_state: Tensor | None) -> torch.dtype:
    if initial_state is not None:
        return initial_state.dtype
    return wide(v.dtype)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, axes: str) -> None:
    """``axes``: the leading axes, ``S`` or ``B, T``."""
    lead = tuple(q.shape[:-2])
    check_rank("q", q, f"[{axes}, H, K]")
    check_dtype("q", q, FLOATS)
    check_shape("k", k, tuple(q.shape), f"[{axes}, H, K]")
    check_shape("v", v, (*lead, None, None), f"[{axes}, HV, V]")
    if q.shape[-2] == 0 or v.shape[-2] % q.shape[-2]:
        raise ValueError(
            f"v must have a multiple of the {q.shape[-2]} heads of q, got {v.shape[-2]}; set num_v_heads accordingly"
        )
    check_dtype("k", k, (q.dtype,))
    check_dtype("v", v, (q.dtype,))
    if g is not None:
        check_shape("g", g, (*lead, v.shape[-2]), f"[{axes}, HV]")
        check_dtype("g", g, (torch.float32, torch.float64))
    if beta is not None:
        check_shape("beta", beta, (*lead, v.shape[-2]), f"[{axes}, HV]")
        check_dtype("beta", beta, FLOATS)
    check_same_device("q", q, k=k, v=v, g=g, beta=beta)


def _check_head_gate(g: Tensor, v: Tensor) -> None:
    check_shape("g", g, (v.shape[-2],), "[HV]")
    check_dtype("g", g, (torch.float32, torch.float64))


def _check_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    segment_start: Tensor,
    segment_length: Tensor,
    chunk_segment: Tensor,
) -> None:
    _check_heads(q, k, v, g, beta, "S")
    check_segments(q.shape[0], segment_start, segment_length, chunk_segment)
    if initial_state is not None:
        expected = (segment_start.shape[0], v.shape[1], q.shape[2], v.shape[2])
        check_shape("initial_state", initial_state, expected, "[NS, HV, K, V]")
        check_dtype("initial_state", initial_state, FLOATS)
    check_same_device("q", q, initial_state=initial_state, segment_start=segment_start)


def _expand_head_gate(g: Tensor, segments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``[HV]`` -> ``[S, HV]``, zero on pad rows."""
    return row_mask(*segments).unsqueeze(1) * g


# ---- chunked form ----------------------------------------------------------------------------------------------------


def _chunk_fake(
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
) -> Six:
    _check_chunk(q, k, v, g, beta, initial_state, segment_start, segment_length, chunk_segment)
    rows, heads, value_dim = v.shape
    state = (heads, q.shape[2], value_dim)

    def saved(flag: bool, *size: int) -> Tensor:
        return v.new_empty(size if flag else (0,))

    delta = beta is not None
    return (
        v.new_empty(v.shape),
        v.new_empty(segment_start.shape[0], *state, dtype=_state_dtype(v, initial_state)),
        saved(bool(save & SAVE_INVERSE) and delta, rows, heads, CHUNK),
        saved(bool(save & SAVE_SCORES), rows, heads, CHUNK),
        saved(bool(save & SAVE_STATES), chunk_segment.shape[0], *state),
        saved(bool(save & SAVE_V_NEW) and delta, rows, heads, value_dim),
    )


def _chunk_cpu(*args: Any) -> Six:
    _check_chunk(*args[:9])
    return cpu.chunk_fwd(*args)


def _chunk_triton(*args: Any) -> Six:
    _check_chunk(*args[:9])
    return launch.chunk_fwd(*contiguous(*args))


def _chunk_bwd_fake(
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
) -> Six:
    _check_chunk(q, k, v, g, beta, initial_state, segment_start, segment_length, chunk_segment)
    check_shape("do", do, tuple(v.shape), "[S, HV, V]")

    def like(x: Tensor | None) -> Tensor:
        return v.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(beta), like(initial_state)


def _chunk_bwd_cpu(*args: Any) -> Six:
    _check_chunk(*args[:9])
    return cpu.chunk_bwd(*args)


def _chunk_bwd_triton(*args: Any) -> Six:
    _check_chunk(*args[:9])
    return launch.chunk_bwd(*contiguous(*args))


chunk_rule_bwd = register_op(
    "chunk_rule_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor segment_start, "
    "Tensor segment_length, Tensor chunk_segment, Tensor inverse, Tensor scores, Tensor states, Tensor v_new, "
    "Tensor do, Tensor? dfinal_state, float scale) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)",
    fake=_chunk_bwd_fake,
    cpu=_chunk_bwd_cpu,
    triton=_chunk_bwd_triton,
)


def _register_chunk(rule: Rule) -> Any:
    """``mom::chunk_<rule>``: the family with the arguments that this rule has."""
    gated, delta = rule.gate != "none", rule.delta

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The rule's arguments -> the family's, with g per row."""
        rest = list(args)
        head = [rest.pop(0) for _ in range(3)]
        g = rest.pop(0) if gated else None
        beta = rest.pop(0) if delta else None
        if g is not None and rule.gate == "head":
            _check_head_gate(g, head[2])
            g = _expand_head_gate(g, tuple(rest[1:4]))  # type: ignore[arg-type]
        return (*head, g, beta, *rest)

    def fake(*args: Any) -> Six:
        return _chunk_fake(*split(args))

    def cpu_implementation(*args: Any) -> Six:
        return _chunk_cpu(*split(args))

    def triton_implementation(*args: Any) -> Six:
        return _chunk_triton(*split(args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
        family = split(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*family[:9], *output[2:])
        ctx.scale = family[9]

    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *family, inverse, scores, states, v_new = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(family[2])
        dq, dk, dv, dg, dbeta, dinitial = chunk_rule_bwd(
            *family, inverse, scores, states, v_new, do, dfinal_state, ctx.scale
        )
        gate = (dg.sum(0) if rule.gate == "head" else dg,) if gated else ()
        return (
            dq,
            dk,
            dv,
            *gate,
            *((dbeta,) if delta else ()),
            None if family[5] is None else dinitial,
            None,
            None,
            None,
            None,
            None,
        )

    return register_op(
        f"chunk_{rule.op}",
        f"(Tensor q, Tensor k, Tensor v, {'Tensor g, ' if gated else ''}{'Tensor beta, ' if delta else ''}"
        "Tensor? initial_state, Tensor segment_start, Tensor segment_length, Tensor chunk_segment, float scale, "
        "int save) -> (Tensor o, Tensor final_state, Tensor inverse, Tensor scores, Tensor states, Tensor v_new)",
        fake=fake,
        cpu=cpu_implementation,
        triton=triton_implementation,
        setup_context=setup_context,
        backward=backward,
        autocast=("q", "k", "v"),
    )


# ---- sequential form -------------------------------------------------------------------------------------------------


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_recurrent(
    state_name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _check_heads(q, k, v, g, beta, "B, T")
    if cu_seqlens is not None:
        check_rank("cu_seqlens", cu_seqlens, "[N+1]")
        if q.shape[0] != 1:
            raise ValueError(f"q must have batch size 1 with cu_seqlens, got {q.shape[0]}; flatten the documents")
    rows = _sequences(q, cu_seqlens)
    if state is not None:
        pool = rows if state_indices is None else None
        check_shape(state_name, state, (pool, v.shape[2], q.shape[3], v.shape[3]), "[P, HV, K, V]")
        check_dtype(state_name, state, FLOATS)
    if state_indices is not None:
        check_shape("state_indices", state_indices, (rows,), "[N]")
        check_dtype("state_indices", state_indices, (torch.int64,))
        if state is None:
            raise ValueError(f"{state_name} must be given with state_indices, got None; pass the pool of states")
    check_same_device("q", q, **{state_name: state}, state_indices=state_indices, cu_seqlens=cu_seqlens)


def _check_recurrent_values(state: Tensor, state_indices: Tensor | None) -> None:
    if state_indices is None:
        return
    used = state_indices[(state_indices >= 0) & (state_indices < state.shape[0])]
    if len(used) != len(used.unique()):
        raise ValueError("state_indices must name different states, got a repeated one; give every row its own state")


def _run_recurrent(triton: bool, args: tuple[Any, ...], state: Tensor) -> Tensor:
    q, k, v, g, beta, _, state_indices, cu_seqlens, scale = args
    if not on_gpu(state):
        _check_recurrent_values(state, state_indices)
    if triton:
        args = contiguous(q, k, v, g, beta, state, state_indices, cu_seqlens, scale)
        if args[5] is not state:
            raise ValueError("state must be contiguous to be updated in place, got a strided one; call .contiguous()")
        return launch.recurrent_fwd(*args)
    return cpu.recurrent_fwd(q, k, v, g, beta, state, state_indices, cu_seqlens, scale)


def _register_recurrent(rule: Rule) -> tuple[Any, Any]:
    """``mom::recurrent_<rule>`` and its in-place twin with a trailing underscore."""
    gated, delta = rule.gate != "none", rule.delta

    def split(args: tuple[Any, ...]) -> tuple[Any, ...]:
        rest = list(args)
        head = [rest.pop(0) for _ in range(3)]
        g = rest.pop(0) if gated else None
        beta = rest.pop(0) if delta else None
        if g is not None and rule.gate == "head":
            _check_head_gate(g, head[2])
            g = g.expand(*head[2].shape[:3])
        return (*head, g, beta, *rest)

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        family = split(args)
        _check_recurrent("initial_state", *family[:8])
        q, v, initial_state = family[0], family[2], family[5]
        shape = (
            (_sequences(q, family[7]), v.shape[2], q.shape[3], v.shape[3])
            if initial_state is None
            else initial_state.shape
        )
        return v.new_empty(v.shape), v.new_empty(shape, dtype=_state_dtype(v, initial_state))

    def functional(triton: bool, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        family = split(args)
        _check_recurrent("initial_state", *family[:8])
        q, v, initial_state = family[0], family[2], family[5]
        if initial_state is None:
            state = v.new_zeros(
                _sequences(q, family[7]), v.shape[2], q.shape[3], v.shape[3], dtype=_state_dtype(v, None)
            )
        else:
            state = initial_state.clone(memory_format=torch.contiguous_format)
        return _run_recurrent(triton, family, state), state

    def inplace(triton: bool, args: tuple[Any, ...]) -> Tensor:
        family = split(args)
        _check_recurrent("state", *family[:8])
        return _run_recurrent(triton, family, family[5])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        family = split(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*family[:8])
        ctx.scale = family[8]

    def backward(ctx: Any, do: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
        grads = _recurrent_backward(ctx.saved_tensors, ctx.scale, do, dfinal_state)
        dq, dk, dv, dg, dbeta, dinitial = grads
        gate = (dg.sum((0, 1)) if dg is not None and rule.gate == "head" else dg,) if gated else ()
        return dq, dk, dv, *gate, *((dbeta,) if delta else ()), dinitial, None, None, None

    arguments = f"Tensor q, Tensor k, Tensor v, {'Tensor g, ' if gated else ''}{'Tensor beta, ' if delta else ''}"
    tail = "Tensor? state_indices, Tensor? cu_seqlens, float scale"
    out_of_place = register_op(
        f"recurrent_{rule.op}",
        f"({arguments}Tensor? initial_state, {tail}) -> (Tensor o, Tensor final_state)",
        fake=fake,
        cpu=lambda *args: functional(False, args),
        triton=lambda *args: functional(True, args),
        setup_context=setup_context,
        backward=backward,
        autocast=("q", "k", "v"),
    )
    in_place = register_op(
        f"recurrent_{rule.op}_",
        f"({arguments}Tensor(a!) state, {tail}) -> Tensor",
        mutates_args=("state",),
        fake=lambda *args: args[2].new_empty(args[2].shape),
        cpu=lambda *args: inplace(False, args),
        triton=lambda *args: inplace(True, args),
        autocast=("q", "k", "v"),
    )
    return out_of_place, in_place


def _recurrent_backward(
    saved: tuple[Tensor | None, ...], scale: float, do: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Through the chunked backward: the tokens are placed in aligned rows, the gradients gathered from them."""
    q, k, v, g, beta, initial_state, state_indices, cu_seqlens = saved
    assert q is not None and k is not None and v is not None
    if do is None:
        do = torch.zeros_like(v)
    state = initial_state
    valid = None
    if state_indices is not None:
        assert initial_state is not None
        pool = initial_state.shape[0]
        valid = (state_indices >= 0) & (state_indices < pool)
        trash = torch.where(valid, state_indices, pool)
        # A skipped row takes part with a zero state, and every gradient of it is masked below.
        state = torch.cat([initial_state, torch.zeros_like(initial_state[:1])])[trash]
    plan = sequence_plan(q.shape[0], q.shape[1], cu_seqlens, q.device)
    tables = (plan.slot_of, plan.entry_of)

    def place(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return permute(x.flatten(0, 1).flatten(1), *tables).unflatten(1, x.shape[2:])

    def back(x: Tensor, like: Tensor) -> Tensor:
        return permute_bwd(x.flatten(1), plan.slot_of).view(like.shape)

    if valid is not None:
        if cu_seqlens is None:
            keep = valid.view(-1, 1, 1, 1)
        else:
            position = torch.arange(q.shape[1], device=q.device)
            keep = valid[torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)].view(1, -1, 1, 1)
        do = do * keep
    dfinal = dfinal_state
    if dfinal_state is not None and state_indices is not None and valid is not None:
        dfinal = torch.cat([dfinal_state, torch.zeros_like(dfinal_state[:1])])[trash]
    rows = (place(q), place(k), place(v), place(g), place(beta))
    saved_none = [v.new_empty(0)] * 4
    dq, dk, dv, dg, dbeta, dstate = chunk_rule_bwd(*rows, state, *plan.segments, *saved_none, place(do), dfinal, scale)
    dinitial: Tensor | None = None
    if initial_state is not None:
        dinitial = dstate
        if state_indices is not None:
            whole = torch.zeros_like(initial_state) if dfinal_state is None else dfinal_state.to(initial_state.dtype)
            whole = torch.cat([whole, torch.zeros_like(whole[:1])])
            dinitial = whole.index_put((trash,), dstate)[:-1]
    return (
        back(dq, q),
        back(dk, k),
        back(dv, v),
        None if g is None else back(dg.unsqueeze(-1), g),
        None if beta is None else back(dbeta.unsqueeze(-1), beta),
        dinitial,
    )


CHUNK_OPS = {rule.name: _register_chunk(rule) for rule in RULES.values()}
RECURRENT_OPS = {rule.name: _register_recurrent(rule) for rule in RULES.values()}
