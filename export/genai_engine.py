"""The graph and the configuration of GenAI's engine, which batches requests as they come and go.

The engine packs the tokens of a step behind one another. The graph lays them out as a padded batch, whose mask the
layers take, and gives the logits of each request's last token. The engine takes no model without a paged cache: there
is one more layer in name, whose keys and values are handed through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import MoMConfig
from ..model import MoMForCausalLM
from .genai_artifact import GenaiProgram, genai_inputs, genai_state_names
from .lowerings import lowerings
from .onnx_artifact import convert, quiet
from .program import DYNAMIC_BATCH, DYNAMIC_LENGTH, EXAMPLE_LENGTH, trace
from .structure import ENGINE_INPUTS, ENGINE_PAGE

ENGINE_FILE = "engine.onnx"
MAX_BATCH = 16  # requests that one step runs
BLOCKS = 4096  # of the paged cache, which bounds the tokens of all requests together


def engine_config(config: MoMConfig) -> dict[str, Any]:
    """What is laid over genai_config.json for the engine."""
    layers = config.num_hidden_layers
    decoder = {
        "filename": ENGINE_FILE,
        "num_hidden_layers": layers + 1,
        "num_key_value_heads": ENGINE_PAGE[1],
        "head_size": ENGINE_PAGE[2],
        "state_groups": [
            {"kind": "paged_kv", "layer_ids": [layers]},
            {"kind": "fixed_conv", "layer_ids": list(range(layers))},
            {"kind": "fixed_recurrent", "layer_ids": list(range(layers))},
        ],
        "inputs": {
            **{name: name for name in ENGINE_INPUTS},
            "past_conv_names": "past_key_values.%d.conv_state",
            "past_recurrent_names": "past_key_values.%d.recurrent_state",
        },
        "outputs": {
            "present_conv_names": "present.%d.conv_state",
            "present_recurrent_names": "present.%d.recurrent_state",
        },
    }
    batching = {"block_size": ENGINE_PAGE[0], "num_blocks": BLOCKS, "max_batch_size": MAX_BATCH}
    return {"model": {"decoder": decoder}, "engine": {"dynamic_batching": batching}}


class EngineProgram(GenaiProgram):
    """``forward(input_ids, cumulative_sequence_lengths, columns, past) -> (logits, present)``."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, cumulative_sequence_lengths: Tensor, columns: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[N]`` int64, cumulative_sequence_lengths ``[B+1]`` int32 from 0 to N, columns ``[T]`` int64 from
        0 to T-1, T the longest of the B pieces; logits ``[B, vocab_size]``."""
        bounds = cumulative_sequence_lengths.to(torch.int64)
        starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
        valid = columns < lengths.unsqueeze(1)  # [B, T]
        rows = (starts.unsqueeze(1) + columns) * valid.to(torch.int64)
        ids = input_ids.index_select(0, rows.flatten()).view(rows.shape)
        with self.lowered():
            x, state, _ = self.model.hidden_states(ids, self.state(self.states(past)), valid, form=self.form)
            last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
            logits = self.model.lm_head(x.gather(1, last).squeeze(1))
        present = [self.stored(name, state[layer][name].flatten(1, 2)) for layer, name in self.names]
        return logits.float(), self.with_dummies(past, present)


def engine_graph(model: MoMForCausalLM, state_dtype: str) -> Any:
    """The graph as an onnx_ir model."""
    _, past = genai_inputs(model, state_dtype)
    tokens = 2 * EXAMPLE_LENGTH - 7
    arguments = (
        torch.arange(tokens) % model.config.vocab_size,
        torch.tensor([0, EXAMPLE_LENGTH, tokens], dtype=torch.int32),
        torch.arange(EXAMPLE_LENGTH),
        past,
    )
    packed = torch.export.Dim("tokens", min=1, max=1 << 22)
    shapes = ({0: packed}, {0: DYNAMIC_BATCH + 1}, {0: DYNAMIC_LENGTH}, [{0: DYNAMIC_BATCH}] * len(past))
    with quiet():
        program = EngineProgram(model, lowerings("onnxruntime", False), state_dtype=state_dtype)
        traced = trace(program, arguments, shapes)
    states = [f"{layer}.{name}" for layer, name in genai_state_names(model.config)]
    inputs: dict[str, str | None] = dict.fromkeys(("input_ids", "cumulative_sequence_lengths", "columns"))
    inputs |= dict.fromkeys(f"past_key_values.{name}" for name in states)
    outputs: dict[str, str | None] = dict.fromkeys(("logits", *(f"present.{name}" for name in states)))
    graph_model = convert(traced, inputs, outputs)
    _compute_columns(graph_model.graph)
    _add_engine_values(graph_model.graph, model.config.num_hidden_layers)
    return graph_model


def _compute_columns(graph: Any) -> None:
    """``columns`` inside the graph: 0 to the longest piece less one. As an input it gave the trace a name for T."""
    import onnx_ir as ir

    values = {value.name: value for value in graph.inputs}
    columns, bounds = values["columns"], values["cumulative_sequence_lengths"]
    tape = ir.tape.Tape()

    def constant(name: str, *numbers: int, scalar: bool = False) -> Any:
        tensor = ir.tensor(numbers[0] if scalar else list(numbers), dtype=ir.DataType.INT64, name=name)
        return graph_initializer(graph, tensor)

    zero, one = constant("column_from", 0), constant("column_one", 1)
    end, last = constant("column_end", 1 << 30), constant("column_last", -1)
    wide = tape.op("Cast", [bounds], {"to": ir.DataType.INT64.value})
    ends, starts = tape.op("Slice", [wide, one, end]), tape.op("Slice", [wide, zero, last])
    longest = tape.op("ReduceMax", [tape.op("Sub", [ends, starts])], {"keepdims": 0})
    first, step = constant("column_first", 0, scalar=True), constant("column_step", 1, scalar=True)
    found = tape.op("Range", [first, longest, step])
    graph.insert_before(graph[0], tape.nodes)
    ir.convenience.replace_all_uses_with(columns, found)
    graph.inputs.remove(columns)


def graph_initializer(graph: Any, tensor: Any) -> Any:
    """A new initializer of a graph."""
    import onnx_ir as ir

    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _add_engine_values(graph: Any, layer: int) -> None:
    """What the engine gives every model: the pages, which only the layer in name would need."""
    import onnx_ir as ir

    logits = graph.outputs[0]
    logits.shape = ir.Shape(["batch_size", logits.shape[1]])  # of this name the engine wants a row per request
    graph.inputs[0].shape = ir.Shape(["num_tokens"])

    def added(name: str, dtype: Any, *shape: int | str) -> Any:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    for position, (name, shape) in enumerate(ENGINE_INPUTS.items(), start=1):
        if position == 1:  # the one of them that the graph reads
            graph.inputs[position].shape = ir.Shape(shape)
        else:
            graph.inputs.insert(position, added(name, ir.DataType.INT32, *shape))
    for name in ("key", "value"):
        page = ("num_blocks", *ENGINE_PAGE)
        past = added(f"past_key_values.{layer}.{name}", ir.DataType.FLOAT, *page)
        present = added(f"present.{layer}.{name}", ir.DataType.FLOAT, *page)
        graph.append(ir.Node("", "Identity", [past], outputs=[present]))
        graph.inputs.append(past)
        graph.outputs.append(present)
