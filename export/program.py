"""The exported program: tokens and a flat state in, logits and the new state out, in the shapes of the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..mom_attention import Form
from ..ops import CHUNK
from ..state import layer_shapes
from .token_nodes import touched_step

DYNAMIC_BATCH = torch.export.Dim("batch", min=1, max=4096)
DYNAMIC_LENGTH = torch.export.Dim("length", min=1, max=1 << 20)
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 70  # longer than one chunk, see check_example_length


def state_names(config: MoMConfig) -> list[tuple[int, str]]:
    """(layer, name) of every state tensor in graph order."""
    return [(layer, name) for layer in range(config.num_hidden_layers) for name in layer_shapes(config, 1)]


def flat_shapes(config: MoMConfig, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's state as the graphs carry it: memories and heads (channels) in one axis."""
    return {
        name: (shape[0], shape[1] * shape[2], *shape[3:]) for name, shape in layer_shapes(config, batch_size).items()
    }


def touched_names(config: MoMConfig) -> dict[str, str]:
    """Name in the whole state -> name of its touched part, in graph order; the index has no whole state."""
    names = {"conv_state": "touched_conv_state"} if config.use_short_conv else {}
    return {**names, "recurrent_state": "touched_state", "": "touched_index"}


class _Replace(TorchFunctionMode):
    """Calls another function in place of each operator of a table."""

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


class StateProgram(nn.Module):
    """``forward(input_ids, past) -> (logits, present)`` over a form of the layers; ``past`` is a flat list of tensors.

    ``lowerings``: operator -> replacement. Replacing them while the model is traced spares a pass over the program.
    Logits and states come out in float32, whatever the model computes in; the recurrent states in ``state_dtype``.
    """

    def __init__(
        self,
        model: MoMForCausalLM,
        lowerings: Mapping[Any, Callable[..., Any]],
        form: Form = "portable",
        state_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.model = model
        self.names = state_names(model.config)
        self.lowerings = lowerings
        self.form: Form = form
        self.state_dtype: torch.dtype = getattr(torch, state_dtype)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A new state, memories and heads (channels) in one axis, in the dtype in which the graph gives it."""
        dtype = self.state_dtype if name in ("recurrent_state", "touched_state") else torch.float32
        return value.to(dtype)

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[B, T]``, past as :func:`flat_shapes`; logits ``[B, T, vocab_size]``."""
        return self.run(input_ids, past, None)

    def run(
        self,
        input_ids: Tensor,
        past: list[Tensor],
        valid: Tensor | None,
        router_indices: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """:meth:`forward` with an optional mask ``[B, T]``, and optional choices ``[B, T, k]`` per layer."""
        logits, present = self.run_form(input_ids, past, valid, self.form, router_indices)
        return logits, [self.stored(name, present[layer][name].flatten(1, 2)) for layer, name in self.names]

    def run_form(
        self,
        input_ids: Tensor,
        past: list[Tensor],
        valid: Tensor | None,
        form: Form,
        router_indices: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Sequence[Mapping[str, Tensor]]]:
        """The model in one of its forms, with the lowerings; the states as the form gives them."""
        with self.lowered():
            out = self.model(
                input_ids, state=self.state(past), attention_mask=valid, router_indices=router_indices, form=form
            )
        assert out.logits is not None
        return out.logits.float(), out.state

    def lowered(self) -> _Replace:
        """A context in which the lowerings replace the operators."""
        return _Replace(self.lowerings)

    def state(self, past: list[Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The model's state from the graph's inputs."""
        memories = self.model.config.total_memories
        state: list[dict[str, Tensor]] = [{} for _ in range(self.model.config.num_hidden_layers)]
        for (layer, name), tensor in zip(self.names, past, strict=True):
            state[layer][name] = tensor.unflatten(1, (memories, -1))
        return tuple(state)


class TouchedProgram(StateProgram):
    """One token in, of the new state only what it wrote: the memories it selected, and which they are."""

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[B, 1]``, past as :func:`flat_shapes`; per layer the entries of :func:`touched_names`."""
        logits, present = self.touched(input_ids, past)
        names = touched_names(self.model.config)
        return logits, [
            values[name] if name == "touched_index" else self.stored(name, values[name])
            for values in present
            for name in names.values()
        ]

    def touched(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, Sequence[Mapping[str, Tensor]]]:
        """Logits, and per layer the values of :func:`touched_names`."""
        if self.form != "step":
            return self.run_form(input_ids, past, None, "touched")
        # The operator of the step form has no place for the choices among its results.
        indices: list[Tensor] = []
        step = partial(touched_step, indices)
        self.lowerings = {**self.lowerings, torch.ops.mom.decode_step: step, torch.ops.mom.decode_step.default: step}
        logits, present = self.run_form(input_ids, past, None, "step")
        names = touched_names(self.model.config)
        layers = zip(present, indices, strict=True)
        return logits, [
            {"touched_index": index} | {names[name]: value.flatten(1, 2) for name, value in values.items()}
            for values, index in layers
        ]


class ForcedProgram(StateProgram):
    """The prefill with the routing given, for verification: below float32 a router rightly chooses otherwise."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, router_indices: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[B, T]``, router_indices ``[B, T, k]`` int64 per layer."""
        return self.run(input_ids, past, None, router_indices)


def example_inputs(
    model: MoMForCausalLM, batch: int, length: int, state_dtype: str = "float32"
) -> tuple[Tensor, list[Tensor]]:
    """Tokens and a non-zero state."""
    config = model.config
    weight = model.lm_head.weight
    ids = torch.arange(batch * length, device=weight.device).view(batch, length) % config.vocab_size
    shapes = flat_shapes(config, batch)
    dtypes = {"conv_state": torch.float32, "recurrent_state": getattr(torch, state_dtype)}
    past = [torch.full(shapes[name], 0.01, dtype=dtypes[name], device=weight.device) for _, name in state_names(config)]
    return ids, past


def check_example_length(length: int) -> None:
    """Raise unless the example crosses a chunk boundary."""
    if length <= CHUNK:
        raise ValueError(
            f"example_length must be more than one chunk of {CHUNK} tokens, got {length}; "
            "traced with fewer, the graph would be silently wrong at longer inputs"
        )


def export_program(
    model: MoMForCausalLM,
    decode: bool,
    lowerings: Mapping[Any, Callable[..., Any]],
    touched: bool = False,
    form: Form = "portable",
    example_length: int = EXAMPLE_LENGTH,
    state_dtype: str = "float32",
) -> torch.export.ExportedProgram:
    """The torch.export program: dynamic batch; one token for decode, any length for prefill; see StateProgram.

    ``touched``: the decode program that gives only the touched part of the state, see TouchedProgram. ``form``: of the
    layers; with ``touched`` it is ``step``, or whatever else for the form ``touched``. ``example_length``: tokens that
    prefill is traced with. ``state_dtype``: of the recurrent states.

    Raises:
        ValueError: an example that fits one chunk.
    """
    check_example_length(example_length)
    ids, past = example_inputs(model, EXAMPLE_BATCH, 1 if decode else example_length, state_dtype)
    ids_shape: dict[int, Any] = {0: DYNAMIC_BATCH} if decode else {0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH}
    shapes = (ids_shape, [{0: DYNAMIC_BATCH}] * len(past))
    program = TouchedProgram if touched else StateProgram
    return trace(program(model.eval(), lowerings, form, state_dtype), (ids, past), shapes)


def export_forced(
    model: MoMForCausalLM, lowerings: Mapping[Any, Callable[..., Any]], state_dtype: str = "float32"
) -> torch.export.ExportedProgram:
    """The torch.export program of a prefill whose routing is given, see ForcedProgram."""
    config = model.config
    ids, past = example_inputs(model, EXAMPLE_BATCH, EXAMPLE_LENGTH, state_dtype)
    chosen = torch.arange(config.topk, device=ids.device).expand(*ids.shape, config.topk).contiguous()
    # Tensors of their own: the exporter takes equal objects for one input.
    indices = [chosen.clone() for _ in range(config.num_hidden_layers)]
    tokens = {0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH}
    shapes = (tokens, [tokens] * len(indices), [{0: DYNAMIC_BATCH}] * len(past))
    program = ForcedProgram(model.eval(), lowerings, state_dtype=state_dtype)
    return trace(program, (ids, indices, past), shapes)


def trace(program: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    """torch.export as every target needs it."""
    with torch.no_grad():
        return torch.export.export(
            program,
            inputs,
            dynamic_shapes=dynamic_shapes,
            strict=False,
            # conv1d compares strides for channels-last; the comparison always holds but cannot be proved.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
