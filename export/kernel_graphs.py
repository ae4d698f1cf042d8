"""ONNX graphs whose nodes are the functions of a kernel pack, as ``cpp/mom_onnx.cpp`` runs them, and plain products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from ..config import MoMConfig
from ..decode import gather_weights
from ..model import MoMForCausalLM
from ..ops._launch import pointer
from ..ops.memory_rule.rules import RULES
from ..projections import retention_gate
from .cpu_graphs import graph_states
from .decode_functions import SMALL_ALIGNMENT, small_parts
from .kernel_function import Dtypes, groups
from .kernel_functions import functions
from .kernel_table import entries
from .onnx_runner import FORCED_GRAPH
from .stored_state import array_dtype
from .structure import OWN_DOMAIN, describe_graph
from .weights_file import WEIGHTS_FILE, WeightsFile

OPSET = 20
POINTER_BYTES = 16  # to which the kernels' buffers are aligned
_TYPES = {"*fp32": "FLOAT", "*fp16": "FLOAT16", "*bf16": "BFLOAT16", "*i32": "INT32", "*i64": "INT64"}


class Part(NamedTuple):
    """A buffer that begins inside another value."""

    value: Any
    offset: int  # bytes


def buffers(config: MoMConfig, dtypes: Dtypes, architecture: int) -> dict[str, dict[str, str]]:
    """Function -> its buffers in order -> their types in the table; those that hold nothing left out."""
    found: dict[str, dict[str, str]] = {}
    for function in functions(config, dtypes):
        names = found.setdefault(function.name, {})
        for entry in entries(function, architecture):
            for argument in entry.arguments:
                if argument.shape is not None and not all(axis.constant and not axis.base for axis in argument.shape):
                    names[argument.name] = argument.type
    return found


def check_alignment(config: MoMConfig, dtypes: Dtypes) -> None:
    """Raise ValueError where parts of the input product would begin off the kernels' alignment."""
    item = dtypes.model.itemsize
    for name, count in (
        ("num_heads * head_dim", config.num_heads * config.head_dim),
        ("value_heads * value_dim", config.value_heads * config.value_dim),
    ):
        if count * item % POINTER_BYTES:
            raise ValueError(
                f"{name} must be a multiple of {POINTER_BYTES // item} for these kernels, got {count}; use --to "
                "onnxruntime"
            )


def write_graphs(
    model: MoMForCausalLM, folder: Path, dtypes: Dtypes, architecture: int, names: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Graphs ``decode``, ``prefill`` and ``prefill_forced`` over one weights file.

    Returns their description by name, and the weights that several have: name, dtype, shape, offset in the file.

    Args:
        model: in float32, on the CPU.
        folder: where they go.
        dtypes: of the pack.
        architecture: any of the pack's: the buffers of a function are the same in all.
        names: which graphs.
    """
    ir = require("onnx_ir", "onnx")
    check_alignment(model.config, dtypes)
    weights = WeightsFile(folder / WEIGHTS_FILE)
    try:
        with torch.no_grad():
            placed = _Placed(model, weights, dtypes)
        known = buffers(model.config, dtypes, architecture)
        used = []
        for name in names:
            graph = _Graph(model.config, dtypes, known, placed, name)
            ir.save(graph.build(), folder / f"{name}.onnx")
            used.append(graph.weights())
    finally:
        weights.close()
    several = {name for one in used for name in one if sum(name in other for other in used) > 1}
    described = [_describe_weight(placed.tensors[name]) for name in sorted(several)]
    return {name: describe_graph(folder / f"{name}.onnx") for name in names}, described


def _describe_weight(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.numpy().name,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
    }


class _Placed:
    """The weights in their file, by name; those behind a norm are multiplied by its weight, as a decode session's."""

    def __init__(self, model: MoMForCausalLM, weights: WeightsFile, dtypes: Dtypes) -> None:
        self._weights, self._dtype = weights, dtypes.model
        self.tensors: dict[str, Any] = {}
        config = model.config
        self._add("embeddings", model.model.embeddings.weight)
        self._add("norm", model.model.norm.weight)
        self._add("lm_head", model.lm_head.weight)
        keys, values = config.num_heads * config.head_dim, config.value_heads * config.value_dim
        for index, block in enumerate(model.model.layers):
            layer, prefix = gather_weights(block), f"layers.{index}"
            attention, kind = layer.attention, RULES[config.rule(index)]
            wide = self._add(f"{prefix}.wide", layer.wide)
            kv_end = keys + groups(config) * (keys + values)
            self._rows(f"{prefix}.q", wide, 0, keys)
            if config.single_kv_proj:  # else a kernel finds them in the whole
                self._rows(f"{prefix}.kv", wide, keys, kv_end)
            if config.use_output_gate:
                self._rows(f"{prefix}.gate", wide, kv_end, layer.wide.shape[0])
            parts = small_parts(config, attention.rule.name)
            each = dict(zip(parts, layer.small.split(list(parts.values())), strict=True))
            self._add(f"{prefix}.small", torch.cat([_padded(part) for part in each.values()]), torch.float32)
            self._add(f"{prefix}.router", each.pop("logits"), torch.float32)
            if each:
                self._add(f"{prefix}.gates", torch.cat(list(each.values())), torch.float32)
            if kind.gate == "scalar":
                self._add(f"{prefix}.A_log", attention.A_log, dtypes.kept)
                self._add(f"{prefix}.dt_bias", attention.dt_bias, dtypes.kept)
            if kind.gate == "head":
                self._add(f"{prefix}.decay", retention_gate(config.value_heads, layer.small.device), torch.float32)
            channels = attention.conv1d if config.use_short_conv else torch.ones(config.conv_channels, 1)
            self._add(f"{prefix}.conv", channels)
            for name in ("o_norm", "o_proj", "gate_up", "down"):
                self._add(f"{prefix}.{name}", getattr(layer, name))

    def _add(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> Any:
        ir = require("onnx_ir", "onnx")
        value = value.detach().to(dtype or self._dtype).contiguous()
        # numpy has no bfloat16 of its own.
        array = value.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
        array = array.view(array_dtype(str(value.dtype).removeprefix("torch.")))
        self.tensors[name] = self._weights.place(ir.tensor(array, name=name))
        return self.tensors[name]

    def _rows(self, name: str, placed: Any, begin: int, end: int) -> None:
        self.tensors[name] = self._weights.rows(placed, begin, end, name)


def _padded(part: Tensor) -> Tensor:
    return torch.nn.functional.pad(part, (0, 0, 0, -part.shape[0] % SMALL_ALIGNMENT))


class _Graph:
    """One graph while it is built."""

    def __init__(
        self,
        config: MoMConfig,
        dtypes: Dtypes,
        known: Mapping[str, Mapping[str, str]],
        placed: _Placed,
        name: str,
    ) -> None:
        self.ir = require("onnx_ir", "onnx")
        self.config, self.name, self._known, self._placed = config, name, known, placed
        self.dtype = getattr(self.ir.DataType, _TYPES[pointer(dtypes.model)])
        self.item = dtypes.model.itemsize
        self.decodes = name == "decode"
        self.keys, self.values = config.num_heads * config.head_dim, config.value_heads * config.value_dim
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._count = 0
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    # ---- values and nodes --------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> Any:
        value = self.ir.Value(
            name=name, type=self.ir.TensorType(getattr(self.ir.DataType, dtype)), shape=self.ir.Shape(shape)
        )
        self._inputs[name] = value
        return value

    def weight(self, name: str) -> Any:
        if name not in self._initializers:
            tensor = self._placed.tensors[name]
            self._initializers[name] = self.ir.Value(
                name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[name]

    def weights(self) -> set[str]:
        """Names of the weights that it has."""
        return self._initializers.keys() & self._placed.tensors.keys()

    def constant(self, *values: int, scalar: bool = False) -> Any:
        array = np.array(values[0] if scalar else values, np.int64)
        name = f"constant_{'_'.join(map(str, values))}{'_scalar' * scalar}"
        if name not in self._initializers:
            tensor = self.ir.tensor(array, name=name)
            self._initializers[name] = self.ir.Value(
                name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[name]

    def node(self, operator: str, inputs: Sequence[Any], dtype: Any = None, **attributes: Any) -> Any:
        """A standard operator of one output."""
        return self._add("", operator, inputs, [dtype or self.dtype], attributes)[0]

    def _add(
        self, domain: str, operator: str, inputs: Sequence[Any], dtypes: Sequence[Any], attributes: dict[str, Any]
    ) -> list[Any]:
        ir, outputs = self.ir, []
        for dtype in dtypes:
            outputs.append(ir.Value(name=f"v{self._count}", type=ir.TensorType(dtype)))
            self._count += 1
        attrs = ir.convenience.convert_attributes(attributes)
        name = f"{operator}_{len(self._nodes)}"
        self._nodes.append(ir.Node(domain, operator, inputs, attrs, outputs=outputs, name=name))
        return outputs

    def kernels(
        self,
        function: str,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, int],
        like: Mapping[str, str] | None = None,
        strides: Mapping[str, int] | None = None,
        rows: int = 1,
        in_place: bool = False,
    ) -> list[Any]:
        """All kernels of a function.

        Args:
            function: its name.
            inputs: buffer -> value or part of one.
            outputs: buffer -> columns, 0 for one axis; one that is an input as well is written in place.
            like: output -> the input whose shape it has.
            strides: whole numbers that are not the table's.
            rows: per token, of functions of rows.
            in_place: the first output is the memory of the first input, in every runtime.

        Returns:
            The values of ``outputs``; the function's other buffers are outputs of the node that nobody reads.
        """
        known = self._known[function]
        assert not inputs.keys() - known.keys() and not outputs.keys() - known.keys(), (function, known)
        like = {**{name: name for name in outputs if name in inputs}, **(like or {})}
        others = [name for name in known if name not in inputs and name not in outputs]
        columns = [*outputs.values(), *(0 for _ in others)]
        parts = [value if isinstance(value, Part) else Part(value, 0) for value in inputs.values()]
        names, strides = [*outputs, *others], strides or {}
        attributes = {
            "function": function,
            "inputs": " ".join(inputs),
            "offsets": [part.offset for part in parts],
            "outputs": " ".join(names),
            "columns": columns,
            "like": [list(inputs).index(like[name]) if name in like else -1 for name in names],
            "numbers": " ".join(strides),
            "values": [*strides.values()] or [0],
            "rows": rows,
        }
        types = [getattr(self.ir.DataType, _TYPES[known[name]]) for name in names]
        operator = "KernelsInPlace" if in_place else "Kernels"
        ids = self._inputs["input_ids"]
        found = self._add(OWN_DOMAIN, operator, [ids, *(part.value for part in parts)], types, attributes)
        return found[: len(outputs)]

    # ---- the model ---------------------------------------------------------------------------------------------------

    def build(self) -> Any:
        """The graph as a model."""
        ir, config = self.ir, self.config
        length = 1 if self.decodes else "sequence"
        ids = self.input("input_ids", "INT64", ["batch", length])
        if self.name == FORCED_GRAPH:
            for layer in range(config.num_hidden_layers):
                self.input(f"router_indices.{layer}", "INT64", ["batch", length, config.topk])
        for layer in range(config.num_hidden_layers):
            for name, shape in graph_states(config).items():
                self.input(f"past_key_values.{layer}.{name}", "FLOAT", shape)
        x = self.node("Gather", [self.weight("embeddings"), ids])
        if not self.decodes:
            self._bounds = self._sequence_bounds(ids)
            x = self.node("Reshape", [x, self.constant(-1, config.hidden_size)])
        for layer in range(config.num_hidden_layers):
            x = self._decode_layer(layer, x) if self.decodes else self._prefill_layer(layer, x)
        (n,) = self.kernels(
            "prefill_head", {"x": x, "norm_weight": self.weight("norm")}, {"result": config.hidden_size}
        )
        if self.decodes:
            head = f"decode_head_{config.rule(0)}"
            (logits,) = self.kernels(head, {"x": n, "weight": self.weight("lm_head")}, {"y": config.vocab_size})
        else:
            logits = self._product(n, "lm_head")
        logits = self._float32(logits)
        sizes: Any = self.constant(-1, 1, config.vocab_size)
        if not self.decodes:
            dims = self.node("Shape", [ids], ir.DataType.INT64)
            sizes = self.node("Concat", [dims, self.constant(config.vocab_size)], ir.DataType.INT64, axis=0)
        logits = self.node("Reshape", [logits, sizes], ir.DataType.FLOAT)
        self._output("logits", logits, ["batch", length, config.vocab_size])
        for layer in range(config.num_hidden_layers):
            for name, shape in graph_states(config).items():
                present = f"present.{layer}.{name}"
                self._output(present, self._outputs[present], shape)
        ordered = [self._outputs[name] for name in ("logits", *self._presents())]
        graph = ir.Graph(
            [*self._inputs.values()],
            ordered,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, OWN_DOMAIN: 1},
            name=f"mom_{self.name}",
        )
        return ir.Model(graph, ir_version=10)

    def _output(self, name: str, value: Any, shape: Sequence[int | str]) -> None:
        value.name, value.shape = name, self.ir.Shape(shape)
        self._outputs[name] = value

    def _presents(self) -> Iterator[str]:
        for layer in range(self.config.num_hidden_layers):
            for name in graph_states(self.config):
                yield f"present.{layer}.{name}"

    def _float32(self, value: Any) -> Any:
        """A value of the model's dtype in float32."""
        real = self.ir.DataType.FLOAT
        return value if self.dtype == real else self.node("Cast", [value], real, to=real)

    def _past(self, layer: int, name: str) -> Any:
        return self._inputs[f"past_key_values.{layer}.{name}"]

    def _product(self, x: Any, weight: str, added: Any = None) -> Any:
        """``x w^T``, and what is added to it."""
        inputs = [x, self.weight(weight)] + ([] if added is None else [added])
        return self.node("Gemm", inputs, transB=1)

    def _decode_layer(self, index: int, x: Any) -> Any:
        config, rule, prefix = self.config, self.config.rule(index), f"layers.{index}"
        kind = RULES[rule]
        kv = groups(config) * (self.keys + self.values)
        width = self.keys + kv + self.values * config.use_output_gate
        parts = {name: count + -count % SMALL_ALIGNMENT for name, count in small_parts(config, rule).items()}
        inputs = {"x": x, "weight": self.weight(f"{prefix}.wide"), "small_weight": self.weight(f"{prefix}.small")}
        wide, small = self.kernels(f"decode_input_{rule}", inputs, {"y": width, "small": sum(parts.values())})
        inputs = {"q": Part(wide, 0), "kv": Part(wide, self.keys * self.item)}
        strides, begin = {"q_stride": width, "kv_stride": width}, 0
        for name, count in parts.items():
            inputs[name] = Part(small, 4 * begin)
            strides[f"{name}_stride"] = sum(parts.values())
            begin += count
        if kind.gate == "scalar":
            inputs |= {name: self.weight(f"{prefix}.{name}") for name in ("A_log", "dt_bias")}
        outputs = {"o": self.values, "state": 0}
        inputs["state"] = self._past(index, "recurrent_state")
        if config.use_short_conv:
            inputs |= {"conv_weight": self.weight(f"{prefix}.conv"), "conv_state": self._past(index, "conv_state")}
            outputs["conv_state"] = 0
        inputs["norm_weight"] = self.weight(f"{prefix}.o_norm")
        if config.use_output_gate:
            inputs["gate"] = Part(wide, (self.keys + kv) * self.item)
            strides["gate_stride"] = width
        o, state, *conv = self.kernels(f"decode_step_{rule}", inputs, outputs, strides=strides)
        self._outputs[f"present.{index}.recurrent_state"] = state
        if conv:
            self._outputs[f"present.{index}.conv_state"] = conv[0]
        x = self._added(f"decode_output_{rule}", x, o, f"{prefix}.o_proj")
        inputs = {"x": x, "weight": self.weight(f"{prefix}.gate_up")}
        (hidden,) = self.kernels(f"decode_mlp_in_{rule}", inputs, {"y": config.mlp_size})
        return self._added(f"decode_mlp_out_{rule}", x, hidden, f"{prefix}.down")

    def _added(self, function: str, residual: Any, x: Any, weight: str) -> Any:
        """The residual stream with a product added to it, in its own memory."""
        inputs = {"y": residual, "x": x, "weight": self.weight(weight)}
        return self.kernels(function, inputs, {"y": 0}, in_place=True)[0]

    def _sequence_bounds(self, ids: Any) -> Any:
        """``[0, T, 2 T, ... B T]``."""
        integer = self.ir.DataType.INT64
        dims = self.node("Shape", [ids], integer)
        batch, length = (
            self.node("Gather", [dims, self.constant(axis, scalar=True)], integer, axis=0) for axis in (0, 1)
        )
        end = self.node("Add", [self.node("Mul", [batch, length], integer), self.constant(1, scalar=True)], integer)
        return self.node("Range", [self.constant(0, scalar=True), end, length], integer)

    def _routing(self, index: int, logits: Any) -> tuple[Any, Any]:
        """Weights and indices ``[tokens, k]``."""
        config = self.config
        if self.name != FORCED_GRAPH:
            weights, indices = self.kernels(
                "route", {"logits": logits}, {"weights": config.topk, "indices": config.topk}
            )
            return weights, indices
        given, real = self._inputs[f"router_indices.{index}"], self.ir.DataType.FLOAT
        indices = self.node("Reshape", [given, self.constant(-1, config.topk)], self.ir.DataType.INT64)
        chosen = self.node("GatherElements", [logits, indices], real, axis=1)
        return self.node("Softmax", [chosen], real, axis=1), indices

    def _prefill_layer(self, index: int, x: Any) -> Any:
        config, rule, prefix = self.config, self.config.rule(index), f"layers.{index}"
        kind, width = RULES[rule], config.hidden_size
        inputs = {"x": x, "small_weight": self.weight(f"{prefix}.router")}
        n, logits = self.kernels("prefill_input", inputs, {"result": width, "small": config.num_memories})
        weights, indices = self._routing(index, logits)
        names = ("slot_of", "entry_of", "segment_start", "segment_length", "chunk_segment", "group_offset")
        tables = dict(
            zip(
                names,
                self.kernels("dispatch", {"indices": indices, "bounds": self._bounds}, dict.fromkeys(names, 0)),
                strict=True,
            )
        )
        entry, chunk = ({name: tables[name]} for name in ("entry_of", "chunk_segment"))
        segments = {name: tables[name] for name in ("segment_start", "segment_length")}
        q = self._product(n, f"{prefix}.q")
        (rows,) = self.kernels("permute", {"x": n, **entry}, {"out": width})
        if config.single_kv_proj:
            kv = self._product(rows, f"{prefix}.kv")
        else:
            weight = Part(self.weight(f"{prefix}.wide"), self.keys * width * self.item)
            inputs = {"x": rows, "weight": weight, "group_offset": tables["group_offset"]}
            (kv,) = self.kernels("kv_rows", inputs, {"y": self.keys + self.values})
        inputs = {"q": q, "kv": kv, "weight": self.weight(f"{prefix}.conv"), **entry, **segments, **chunk}
        outputs = {"q_out": 0, "k_out": 0, "v_out": self.values}
        if config.use_short_conv:
            inputs["state"], outputs["out"] = self._past(index, "conv_state"), 0
        q, k, v, *conv = self.kernels("conv_qkv", inputs, outputs)
        for state in conv:
            # Not written at once: the runtime may have given it the memory of the state before, which is still read.
            shape = self.constant(-1, config.total_memories * config.conv_channels, config.conv_size - 1)
            present = self._float32(self.node("Reshape", [state, shape]))
            self._outputs[f"present.{index}.conv_state"] = present
        v, gates = self._gates(index, x, v, entry, chunk)
        inputs = {"q": q, "k": k, "v": v, **gates, "initial_state": self._past(index, "recurrent_state")}
        if not kind.delta:
            inputs["v_new"] = v
        o, state = self.kernels(
            f"chunk_{rule}", {**inputs, **segments, **chunk}, {"o": self.values, "final_state": 0},
            like={"final_state": "initial_state"},
        )  # fmt: skip
        self._outputs[f"present.{index}.recurrent_state"] = state
        inputs = {"o": o, "weights": weights, "slot_of": tables["slot_of"]}
        (o,) = self.kernels("combine", inputs, {"out": self.values})
        norm = self.weight(f"{prefix}.o_norm")
        if config.use_output_gate:
            inputs = {"x": o, "gate": self._product(n, f"{prefix}.gate"), "weight": norm}
            (o,) = self.kernels("gated_rms_norm", inputs, {"y": self.values}, rows=config.value_heads)
        else:
            inputs = {"x": o, "norm_weight": norm}
            (o,) = self.kernels("prefill_output", inputs, {"result": self.values}, rows=config.value_heads)
        x = self._product(o, f"{prefix}.o_proj", added=x)
        (n,) = self.kernels("prefill_norm", {"x": x}, {"result": width})
        (hidden,) = self.kernels("swiglu", {"x": self._product(n, f"{prefix}.gate_up")}, {"y": config.mlp_size})
        return self._product(hidden, f"{prefix}.down", added=x)

    def _gates(self, index: int, x: Any, v: Any, entry: dict[str, Any], chunk: dict[str, Any]) -> tuple[Any, Any]:
        """The values, multiplied by dt where the rule wants it, and g and beta of the rows."""
        config, rule, prefix = self.config, self.config.rule(index), f"layers.{index}"
        kind = RULES[rule]
        parts = {name: count for name, count in small_parts(config, rule).items() if name != "logits"}
        outputs = {name: 0 for name, present in (("g", kind.gate != "none"), ("beta", kind.delta)) if present}
        if not outputs:
            return v, {}
        inputs: dict[str, Any] = {}
        if rule == "mamba2":
            inputs["v"], outputs = v, {"v": 0, **outputs}
        inputs |= {**entry, **chunk}
        if parts:
            given = {"x": x, "small_weight": self.weight(f"{prefix}.gates")}
            (inputs["small"],) = self.kernels(f"prefill_small_{rule}", given, {"small": sum(parts.values())})
        if kind.gate == "scalar":
            inputs |= {name: self.weight(f"{prefix}.{name}") for name in ("A_log", "dt_bias")}
        if kind.gate == "head":
            inputs["decay"] = self.weight(f"{prefix}.decay")
        found = self.kernels(f"gate_rows_{rule}", inputs, outputs, in_place="v" in inputs)
        gates = dict(zip(outputs, found, strict=True))
        return gates.pop("v", v), gates
