"""Graphs whose nodes are the operators of ``cpp/mom_cpu.cpp``, over the weights of the graphs without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..ops.memory_rule import RULES
from ..projections import small_weights
from ..state import layer_shapes
from .structure import OWN_DOMAIN

OPSET = 20
MICROSOFT = "com.microsoft"


def decode_cpu_graph(model: MoMForCausalLM) -> Any:
    """One token as an onnx_ir model, a node a layer; inputs, outputs and their values as those of ``decode.onnx``.

    Args:
        model: in float32, on the CPU.
    """
    return _DecodeGraph(model, 1).build()


def prefill_cpu_graph(model: MoMForCausalLM) -> Any:
    """Any number of tokens as an onnx_ir model: all between two products is a node; as ``prefill.onnx``.

    Args:
        model: in float32, on the CPU.
    """
    return _PrefillGraph(model, "sequence").build()


class _Graph:
    """A graph while it is built."""

    def __init__(self, model: MoMForCausalLM, length: int | str) -> None:
        self.ir = require("onnx_ir", "onnx")
        self.model, self.config, self.length = model, model.config, length
        self._initializers: list[Any] = []
        self._nodes: list[Any] = []

    def build(self) -> Any:
        ir, config = self.ir, self.config
        ids = self.value("input_ids", ["batch", self.length], ir.DataType.INT64)
        past, present = (
            [
                {name: self.value(f"{prefix}.{layer}.{name}", shape) for name, shape in graph_states(config).items()}
                for layer in range(config.num_hidden_layers)
            ]
            for prefix in ("past_key_values", "present")
        )
        logits = self.value("logits", ["batch", self.length, config.vocab_size])
        embedding = self.weight("embeddings", self.model.model.embeddings.weight)
        self._body(self.node("", "Gather", [embedding, ids])[0], past, present, logits)
        graph = ir.Graph(
            [ids, *(value for layer in past for value in layer.values())],
            [logits, *(value for layer in present for value in layer.values())],
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": OPSET, OWN_DOMAIN: 1, MICROSOFT: 1},
        )
        return ir.Model(graph, ir_version=10)

    def _body(self, x: Any, past: Sequence[dict[str, Any]], present: Sequence[dict[str, Any]], logits: Any) -> None:
        raise NotImplementedError

    def _blocks(self) -> Iterator[Any]:
        yield from self.model.model.layers

    def attributes(self, index: int) -> dict[str, Any]:
        """Of an operator with the memories of a layer."""
        config = self.config
        return {
            "heads": config.num_heads,
            "value_heads": config.value_heads,
            "memories": config.num_memories,
            "topk": config.topk,
            "shared": int(config.shared_mem),
            "rule": config.rule(index),
            "eps": config.norm_eps,
            "scale": config.head_dim**-0.5,
        }

    def recurrence(self, index: int, attention: Any) -> list[Any]:
        """Convolution, gates and norm of a layer, None where it has none."""
        gated = RULES[self.config.rule(index)].gate == "scalar"
        return [
            self.weight(f"layers.{index}.conv", attention.conv1d) if self.config.use_short_conv else None,
            self.weight(f"layers.{index}.A_log", attention.A_log) if gated else None,
            self.weight(f"layers.{index}.dt_bias", attention.dt_bias) if gated else None,
            self.weight(f"layers.{index}.o_norm", attention.o_norm.weight),
        ]

    def products(self, index: int, attention: Any) -> tuple[Any, Any, Any]:
        """Weights of the products of a layer's input: small ones, q and kv, output gate or None."""
        gate = self.product(f"layers.{index}.g", attention.g_proj.weight) if self.config.use_output_gate else None
        return (
            self.product(f"layers.{index}.small", *small_weights(attention)),
            self.product(f"layers.{index}.qkv", attention.q_proj.weight, attention.kv_proj.flatten(0, 1)),
            gate,
        )

    def value(self, name: str | None, shape: Sequence[int | str] | None = None, dtype: Any = None) -> Any:
        ir = self.ir
        return ir.Value(
            name=name, type=ir.TensorType(dtype or ir.DataType.FLOAT), shape=None if shape is None else ir.Shape(shape)
        )

    def product(self, name: str, *parts: Tensor) -> Any:
        """A product's weight ``[inputs, outputs]``, as the other graphs have it: it is in the file once."""
        return self.weight(name, *parts, transposed=True)

    def weight(self, name: str, *parts: Tensor, transposed: bool = False) -> Any:
        """The parts one over the other, made when they are written: all at once they would be a copy of the model."""

        def make() -> Any:
            value = torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
            return self.ir.tensor((value.t() if transposed else value).contiguous().numpy(), name=name)

        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
        tensor = self.ir.LazyTensor(
            make, self.ir.DataType.FLOAT, self.ir.Shape(shape[::-1] if transposed else shape), name=name
        )
        result = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._initializers.append(result)
        return result

    def node(self, domain: str, operator: str, inputs: Sequence[Any], outputs: Any = 1, **attributes: Any) -> list[Any]:
        """Add a node; ``outputs``: their values, or how many. Inputs that are None at the end are left out."""
        while inputs[-1] is None:
            inputs = inputs[:-1]
        name = f"{operator}_{len(self._nodes)}"
        if isinstance(outputs, int):
            outputs = [self.value(f"{name}.{i}") for i in range(outputs)]
        attrs = self.ir.convenience.convert_attributes(attributes)
        self._nodes.append(self.ir.Node(domain, operator, inputs, attrs, outputs=outputs, name=name))
        return list(outputs)


class _DecodeGraph(_Graph):
    def _body(self, x: Any, past: Sequence[dict[str, Any]], present: Sequence[dict[str, Any]], logits: Any) -> None:
        for index, block in enumerate(self._blocks()):
            attention, mlp = block.attn, block.mlp
            prefix, y = f"layers.{index}", self.value(f"layers.{index}")
            weights = [
                self.weight(f"{prefix}.attn_norm", block.attn_norm.weight),
                *self.products(index, attention),
                *self.recurrence(index, attention),
                self.product(f"{prefix}.o", attention.o_proj.weight),
                self.weight(f"{prefix}.mlp_norm", block.mlp_norm.weight),
                self.product(f"{prefix}.gate", mlp.gate_proj.weight),
                self.product(f"{prefix}.up", mlp.up_proj.weight),
                self.product(f"{prefix}.down", mlp.down_proj.weight),
            ]
            inputs = [x, *weights, *_in_order(past[index])]
            outputs = [y, *_in_order(present[index])]
            self.node(OWN_DOMAIN, "DecodeLayer", inputs, outputs, **self.attributes(index))
            x = y
        norm = self.weight("norm", self.model.model.norm.weight)
        head = self.product("lm_head", self.model.lm_head.weight)
        self.node(OWN_DOMAIN, "DecodeHead", [x, norm, head], [logits], eps=self.config.norm_eps)


class _PrefillGraph(_Graph):
    def _body(self, x: Any, past: Sequence[dict[str, Any]], present: Sequence[dict[str, Any]], logits: Any) -> None:
        added = None
        for index, block in enumerate(self._blocks()):
            attention, mlp = block.attn, block.mlp
            prefix = f"layers.{index}"
            x, n = self._add_norm(x, added, f"{prefix}.attn_norm", block.attn_norm.weight)
            small, qkv, gate = (
                None if weight is None else self._times(n, weight) for weight in self.products(index, attention)
            )
            inputs = [qkv, small, gate, *self.recurrence(index, attention), *_in_order(past[index])]
            o = self.value(f"{prefix}.memories")
            outputs = [o, *_in_order(present[index])]
            self.node(OWN_DOMAIN, "Memories", inputs, outputs, **self.attributes(index))
            added = self._times(o, self.product(f"{prefix}.o", attention.o_proj.weight))
            x, n = self._add_norm(x, added, f"{prefix}.mlp_norm", block.mlp_norm.weight)
            left, right = (
                self._times(n, self.product(f"{prefix}.{name}", getattr(mlp, f"{name}_proj").weight))
                for name in ("gate", "up")
            )
            left = self.node(MICROSOFT, "QuickGelu", [left], alpha=1.0)[0]  # which is SiLU
            hidden = self.node("", "Mul", [left, right])[0]
            added = self._times(hidden, self.product(f"{prefix}.down", mlp.down_proj.weight))
        _, n = self._add_norm(x, added, "norm", self.model.model.norm.weight)
        self.node("", "MatMul", [n, self.product("lm_head", self.model.lm_head.weight)], [logits])

    def _add_norm(self, x: Any, added: Any, name: str, weight: Any) -> list[Any]:
        """The sum, and its RMSNorm."""
        inputs = [x, added, self.weight(name, weight)]
        return self.node(OWN_DOMAIN, "AddNorm", inputs, 2, eps=self.config.norm_eps)

    def _times(self, x: Any, weight: Any) -> Any:
        return self.node("", "MatMul", [x, weight])[0]


def graph_states(config: MoMConfig) -> dict[str, list[int | str]]:
    """A layer's states with memories and heads (channels) in one axis."""
    return {name: ["batch", shape[1] * shape[2], *shape[3:]] for name, shape in layer_shapes(config, 1).items()}


def _in_order(states: dict[str, Any]) -> list[Any]:
    """As the operators take and give them."""
    return [states[name] for name in ("recurrent_state", "conv_state") if name in states]
