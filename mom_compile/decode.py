"""Decode sessions: one token at a time on buffers of their own, as a CUDA graph on a GPU."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import decode_inline
from .ops import decode_linear, decode_linear_, decode_step_
from .projections import small_weights, split_small
from .state import LayerState, State, check_state

if TYPE_CHECKING:
    from .model import MoMForCausalLM
    from .mom_attention import MoMAttention

WARM_UP_STEPS = 2


class DecodeWeights(NamedTuple):
    """A block's weights as its decode step reads them; those behind a norm are multiplied by its weight."""

    attention: MoMAttention
    wide: Tensor  # q, keys and values of every memory, output gate
    small: Tensor  # router, beta, decay: float32
    o_norm: Tensor
    o_proj: Tensor
    gate_up: Tensor
    down: Tensor


class _Operators(NamedTuple):
    """What a step is made of."""

    linear: Callable[..., tuple[Tensor, Tensor | None]]
    linear_: Callable[..., None]
    step_: Callable[..., Tensor]


_OPERATORS = _Operators(decode_linear, decode_linear_, decode_step_)
_INLINE = _Operators(decode_inline.decode_linear, decode_inline.decode_linear_, decode_inline.decode_step_)


@cache
def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU; warns, once, where it does not."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # the class differs between versions
        warnings.warn(f"decoding stays eager: torch.compile finds no C++ compiler ({error}); install g++", stacklevel=3)
        return False
    return True


def supports_session(model: MoMForCausalLM) -> bool:
    """Whether a :class:`DecodeSession` can serve the model: its own routers, one dtype and one device."""
    custom = any(layer.attn.custom_router is not None for layer in model.model.layers)  # type: ignore[union-attr]
    return not custom and len({(p.dtype, p.device) for p in model.parameters()}) == 1


class DecodeSession:
    """Decodes one token per sequence and call, in place on a state that it owns.

    The weights that one product can read are laid side by side once (a copy of the input projections and of half the
    MLP), the state lies in fixed buffers, and on a GPU the whole step of the model is one CUDA graph: no host sync, no
    allocation. The session reads the model's parameters as they were when it was made; :attr:`stale` says when they
    have changed since.

    Args:
        model: a :class:`MoMForCausalLM` with its own routers, all parameters of one dtype on one device.
        batch_size: sequences, at least 1.
        dtype: of the recurrent state, as for ``model.init_state``.
        conv_dtype: of the convolution's state, by default that of the parameters.
        compile: run the step as one graph of ``torch.compile`` (for CPUs; only the first step compiles).
            Without a C++ compiler the step stays eager and a warning says so.
        graph: capture a CUDA graph; None: on a GPU.

    Raises:
        ValueError: a model or batch size that it cannot serve.
    """

    def __init__(
        self,
        model: MoMForCausalLM,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        conv_dtype: torch.dtype | None = None,
        compile: bool = False,
        graph: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}; pass the number of sequences")
        if not supports_session(model):
            raise ValueError(
                "model must have its own routers and parameters of one dtype on one device, got another; "
                "call the model itself with its state"
            )
        self.config = model.config
        self.batch_size = batch_size
        self._fingerprint = _fingerprint(model)
        self._parameters = list(model.parameters())
        with torch.no_grad():
            self._layers = [gather_weights(block) for block in model.model.layers]
            self._embedding = model.model.embeddings.weight.detach()
            self._norm, self._head = model.model.norm.weight.detach(), model.lm_head.weight.detach()
            device = self._head.device
            state = model.init_state(batch_size, device, dtype)
            if conv_dtype is not None:
                state = tuple(
                    {name: x.to(conv_dtype) if name == "conv_state" else x for name, x in layer.items()}
                    for layer in state
                )
            self._state: State = state
            self._ids = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.compiled = compile and has_compiler()
            self._operators = _INLINE if self.compiled and device.type == "cpu" else _OPERATORS
            self._step: Callable[[], Tensor] = self._run
            if self.compiled:
                # Every tensor it reads is the session's own: no guard could ever fail, and checking them takes longer
                # than a small model's step.
                options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
                # Dynamo keeps graphs by code object: without guards, sessions must not share one.
                own = FunctionType(DecodeSession._run.__code__.replace(), globals())
                self._step = torch.compile(MethodType(own, self), fullgraph=True, dynamic=False, options=options)
            self._graph: torch.cuda.CUDAGraph | None = None
            if device.type == "cuda" if graph is None else graph:
                self._capture()

    @property
    def device(self) -> torch.device:
        """Where the session runs."""
        return self._ids.device

    def stale(self, model: MoMForCausalLM) -> bool:
        """Whether the model's parameters have changed since the session was made."""
        return self._fingerprint is None or _fingerprint(model) != self._fingerprint

    def load(self, state: Sequence[LayerState]) -> None:
        """Continue from ``state``, which is copied.

        Raises:
            ValueError: a state of another model, batch, dtype or device.
        """
        check_state(self.config, state, self.batch_size, self.device)
        for index, (own, given) in enumerate(zip(self._state, state, strict=True)):
            for name, value in own.items():
                if given[name].dtype != value.dtype:
                    raise ValueError(
                        f"state[{index}][{name!r}] must have the session's dtype {value.dtype}, got "
                        f"{given[name].dtype}; convert it, or make a session with its dtype"
                    )
        for own, given in zip(self._state, state, strict=True):
            for name, value in own.items():
                value.copy_(given[name])

    def state(self) -> State:
        """A copy of the state after the tokens so far."""
        return tuple({name: value.clone() for name, value in layer.items()} for layer in self._state)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Take one token per sequence.

        Args:
            ids: ``[B]`` int64 in [0, vocab_size), on the session's device.

        Returns:
            ``[B, vocab_size]`` logits of the next token. With a CUDA graph the next call overwrites them.

        Raises:
            ValueError: ids of another shape.
        """
        if tuple(ids.shape) != (self.batch_size,):
            raise ValueError(f"ids must be [B] = ({self.batch_size},), got shape {tuple(ids.shape)}; one id a sequence")
        self._ids.copy_(ids)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        # On zeros that load overwrites; the capture itself runs nothing.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph
        for layer in self._state:
            for value in layer.values():
                value.zero_()

    def _run(self) -> Tensor:
        eps = self.config.norm_eps
        x = self._embedding[self._ids]  # faster for few rows than an embedding on a GPU
        for layer, state in zip(self._layers, self._state, strict=True):
            _block(layer, state, x, eps, self._operators)
        return self._operators.linear(x, self._head, norm_weight=self._norm, norm=True, eps=eps)[0]


def _block(layer: DecodeWeights, state: LayerState, x: Tensor, eps: float, operators: _Operators) -> None:
    """One block's step on x ``[B, D]`` and the state, both in place."""
    attention, config = layer.attention, layer.attention.config
    batch, groups = x.shape[0], attention.kv_proj.shape[0]
    wide, small = operators.linear(x, layer.wide, small_weight=layer.small, norm=True, eps=eps)
    key_size, value_size = attention.key_size, attention.value_size
    kv_size = groups * (key_size + value_size)
    assert small is not None
    logits, b, a = split_small(attention, small.unsqueeze(1))
    o = operators.step_(
        wide[:, :key_size].unsqueeze(1),
        torch.unflatten(wide[:, key_size : key_size + kv_size], 1, (1, groups, key_size + value_size)),
        state["recurrent_state"],
        state.get("conv_state"),
        router_logits=logits,
        a=a,
        b=b,
        A_log=attention.A_log.detach() if a is not None else None,
        dt_bias=attention.dt_bias.detach() if a is not None else None,
        conv_weight=attention.conv1d.detach() if config.use_short_conv else None,
        rule=attention.rule.name,
        topk=config.topk,
        shared=config.shared_mem,
        scale=attention.scale,
        norm_weight=layer.o_norm,
        gate=wide[:, key_size + kv_size :].unsqueeze(1) if config.use_output_gate else None,
        eps=eps,
    )
    operators.linear_(x, o.view(batch, value_size), layer.o_proj)
    hidden, _ = operators.linear(x, layer.gate_up, norm=True, swiglu=True, eps=eps)
    operators.linear_(x, hidden, layer.down)


def gather_weights(block: Any) -> DecodeWeights:
    """Those of a block, side by side."""
    attention, mlp = block.attn, block.mlp
    wide = [attention.q_proj.weight, attention.kv_proj.flatten(0, 1)]
    if attention.config.use_output_gate:
        wide.append(attention.g_proj.weight)
    dtype = torch.promote_types(attention.q_proj.weight.dtype, torch.float32)
    norm = block.attn_norm.weight.to(dtype)
    return DecodeWeights(
        attention,
        _behind(wide, norm),
        (torch.cat([weight.to(dtype) for weight in small_weights(attention)]) * norm).detach(),
        attention.o_norm.weight.detach(),
        attention.o_proj.weight.detach(),
        _behind([mlp.gate_proj.weight, mlp.up_proj.weight], block.mlp_norm.weight),
        mlp.down_proj.weight.detach(),
    )


def _behind(weights: list[Tensor], norm: Tensor) -> Tensor:
    """The weights one over the other, their columns multiplied by the weight of the norm before them."""
    dtype = torch.promote_types(norm.dtype, torch.float32)
    return torch.cat([(weight.to(dtype) * norm.to(dtype)).to(weight.dtype) for weight in weights]).detach()


def _fingerprint(model: MoMForCausalLM) -> tuple[tuple[int, int], ...] | None:
    """Changes when a parameter is written or replaced; None where torch does not count the writes."""
    parameters = list(model.parameters())
    if any(p.is_inference() for p in parameters):
        return None
    return tuple((p.data_ptr(), p._version) for p in parameters)


_SESSIONS: weakref.WeakKeyDictionary[MoMForCausalLM, DecodeSession] = weakref.WeakKeyDictionary()


def session_for(model: MoMForCausalLM, state: Sequence[LayerState], compile: bool = False) -> DecodeSession:
    """A session that continues from ``state``: the model's last one where it fits, otherwise a new one.

    With ``compile`` one that is not compiled does not fit; a compiled one always does.
    """
    first = state[0]
    batch, dtype = first["recurrent_state"].shape[0], first["recurrent_state"].dtype
    conv_dtype = first["conv_state"].dtype if "conv_state" in first else None
    session = _SESSIONS.pop(model, None)
    if session is not None:
        own = session._state[0]
        same = own["recurrent_state"].dtype == dtype and session.batch_size == batch
        same = same and ("conv_state" not in own or own["conv_state"].dtype == conv_dtype)
        same = same and (session.compiled or not (compile and has_compiler()))
        if not same or session.stale(model):
            session = None
    if session is None:
        session = DecodeSession(model, batch, dtype=dtype, conv_dtype=conv_dtype, compile=compile)
    session.load(state)
    _SESSIONS[model] = session
    return session
