"""The decode graph whose nodes are the operators of ``cpp/mom_cpu.cpp``, over the weights of the other graphs."""

from __future__ import annotations

from collections.abc import Sequence
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


@torch.no_grad()
def decode_cpu_graph(model: MoMForCausalLM) -> Any:
    """The graph as an onnx_ir model: inputs, outputs and values as those of ``decode.onnx``.

    Args:
        model: in float32, on the CPU.
    """
    return _Graph(model).build()


class _Graph:
    def __init__(self, model: MoMForCausalLM) -> None:
        self.ir = require("onnx_ir", "onnx")
        self.model, self.config = model, model.config
        self._initializers: list[Any] = []
        self._nodes: list[Any] = []

    def build(self) -> Any:
        ir, config, body = self.ir, self.config, self.model.model
        ids = self._value("input_ids", ["batch", 1], ir.DataType.INT64)
        past, present = (
            [
                {name: self._value(f"{prefix}.{layer}.{name}", shape) for name, shape in _states(config).items()}
                for layer in range(config.num_hidden_layers)
            ]
            for prefix in ("past_key_values", "present")
        )
        logits = self._value("logits", ["batch", 1, config.vocab_size])
        x = self._value("x")
        self._node("", "Gather", [self._weight("embeddings", body.embeddings.weight), ids], [x])
        for index, block in enumerate(body.layers):
            y = self._value(f"layers.{index}")
            self._layer(index, block, x, y, past[index], present[index])
            x = y
        norm, head = (
            self._weight("norm", body.norm.weight),
            self._weight("lm_head", self.model.lm_head.weight, transposed=True),
        )
        self._node(OWN_DOMAIN, "DecodeHead", [x, norm, head], [logits], eps=config.norm_eps)
        graph = ir.Graph(
            [ids, *(value for layer in past for value in layer.values())],
            [logits, *(value for layer in present for value in layer.values())],
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": OPSET, OWN_DOMAIN: 1},
        )
        return ir.Model(graph, ir_version=10)

    def _layer(self, index: int, block: Any, x: Any, y: Any, past: dict[str, Any], present: dict[str, Any]) -> None:
        config, attention, mlp = self.config, block.attn, block.mlp
        gated = RULES[config.rule(index)].gate == "scalar"

        def weight(name: str, *parts: Tensor) -> Any:
            return self._weight(f"layers.{index}.{name}", *parts)

        def product(name: str, *parts: Tensor) -> Any:
            """As the other graphs have it, ``[inputs, outputs]``: it is in the file once."""
            return self._weight(f"layers.{index}.{name}", *parts, transposed=True)

        inputs = [
            x,
            weight("attn_norm", block.attn_norm.weight),
            product("small", *small_weights(attention)),
            product("qkv", attention.q_proj.weight, attention.kv_proj.flatten(0, 1)),
            product("output_gate", attention.g_proj.weight) if config.use_output_gate else None,
            weight("conv", attention.conv1d) if config.use_short_conv else None,
            weight("A_log", attention.A_log) if gated else None,
            weight("dt_bias", attention.dt_bias) if gated else None,
            weight("o_norm", attention.o_norm.weight),
            product("o", attention.o_proj.weight),
            weight("mlp_norm", block.mlp_norm.weight),
            product("gate", mlp.gate_proj.weight),
            product("up", mlp.up_proj.weight),
            product("down", mlp.down_proj.weight),
        ]
        inputs += [past["recurrent_state"], past.get("conv_state")]
        self._node(
            OWN_DOMAIN,
            "DecodeLayer",
            inputs[: len(inputs) - (inputs[-1] is None)],
            [y, present["recurrent_state"], *(present[name] for name in present if name == "conv_state")],
            heads=config.num_heads,
            value_heads=config.value_heads,
            memories=config.num_memories,
            topk=config.topk,
            shared=int(config.shared_mem),
            rule=config.rule(index),
            eps=config.norm_eps,
            scale=attention.scale,
        )

    def _value(self, name: str, shape: Sequence[int | str] | None = None, dtype: Any = None) -> Any:
        ir = self.ir
        return ir.Value(
            name=name,
            type=ir.TensorType(dtype or ir.DataType.FLOAT),
            shape=None if shape is None else ir.Shape(shape),
        )

    def _weight(self, name: str, *parts: Tensor, transposed: bool = False) -> Any:
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

    def _node(
        self, domain: str, operator: str, inputs: Sequence[Any], outputs: Sequence[Any], **attributes: Any
    ) -> None:
        attrs = self.ir.convenience.convert_attributes(attributes)
        name = f"{operator}_{len(self._nodes)}"
        self._nodes.append(self.ir.Node(domain, operator, inputs, attrs, outputs=outputs, name=name))


def _states(config: MoMConfig) -> dict[str, list[int | str]]:
    """A layer's states with memories and heads (channels) in one axis."""
    return {name: ["batch", shape[1] * shape[2], *shape[3:]] for name, shape in layer_shapes(config, 1).items()}
