"""What a kernel pack holds is enough: a prefill out of its kernels and plain products alone equals the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import write_cases
from models import VARIANTS, tiny_model
from support import INTERPRET, ON_GPU, assert_close
from torch import Tensor

from mom_compile import MoMForCausalLM
from mom_compile.export.kernel_function import Dtypes
from mom_compile.export.prefill_functions import ORDER, prefill_functions
from mom_compile.mom_attention import MoMAttention
from mom_compile.ops._layout import CHUNK
from mom_compile.ops.dispatch import DispatchPlan, rows_bound
from mom_compile.projections import retention_gate, small_weights

pytest.importorskip("triton")
if not INTERPRET and not ON_GPU:
    pytest.skip("runs the kernels: TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from mom_compile.export.prefill_gates import gate_rows
from mom_compile.ops.combine import launch as combine
from mom_compile.ops.conv_qkv import launch as conv_qkv
from mom_compile.ops.decode_linear import launch as decode_linear
from mom_compile.ops.dispatch import launch as dispatch
from mom_compile.ops.gated_rms_norm import launch as gated_rms_norm
from mom_compile.ops.grouped_linear import launch as grouped_linear
from mom_compile.ops.memory_rule import launch as memory_rule
from mom_compile.ops.permute import launch as permute
from mom_compile.ops.route import launch as route

State = list[dict[str, Tensor]]
FLOAT32 = Dtypes(torch.float32, torch.float32)


def behind(norm: Any, weight: Any) -> Tensor:
    result: Tensor = weight * norm
    return result


def prefill(model: MoMForCausalLM, ids: Tensor, bounds: Tensor, state: State) -> tuple[Tensor, State]:
    """The order of the header, a function a line; ``@`` where it says PRODUCT."""
    config, eps, new_state = model.config, model.config.norm_eps, []
    x = permute.permute_fwd(model.model.embeddings.weight, torch.empty(0, 1, dtype=torch.int32), ids.int())
    layers: Any = model.model.layers
    for layer, before in zip(layers, state, strict=True):
        attention: MoMAttention = layer.attn
        norm, mlp = layer.attn_norm.weight, layer.mlp
        router, *gates = (behind(norm, weight) for weight in small_weights(attention))
        n, logits = decode_linear.prepare(x, None, router, True, eps)
        small = decode_linear.prepare(x, None, torch.cat(gates), True, eps)[1] if gates else None
        weights, indices = route.route_fwd(logits, config.topk)
        # A chunk more than suffices: an application may keep buffers of one size.
        rows = rows_bound(ids.shape[0], config.topk, bounds.shape[0] - 1, config.num_memories, config.shared_mem)
        rows += CHUNK
        tables = dispatch.dispatch(indices, bounds, None, config.num_memories, config.shared_mem, CHUNK, rows)
        plan = DispatchPlan(*tables)
        # norm is folded into the weights, as it is for decode
        q = n @ behind(norm, attention.q_proj.weight).t()
        kv, kv_weight = permute.permute_fwd(n, plan.slot_of, plan.entry_of), behind(norm, attention.kv_proj)
        if config.single_kv_proj:
            kv = kv @ kv_weight[0].t()
        else:
            kv = grouped_linear.grouped_linear_own(kv, kv_weight, plan.group_offset)
        conv = attention.conv1d if config.use_short_conv else torch.ones(config.conv_channels, 1)
        history = before["conv_state"].flatten(0, 1) if config.use_short_conv else None
        q, k, v, conv_state = conv_qkv.conv_qkv_fwd(
            q, kv, conv, history, plan.slot_of, plan.entry_of, *plan.segments, config.head_dim
        )
        v = v.view(-1, config.value_heads, config.value_dim)
        rule = attention.rule
        scalar = rule.gate == "scalar"
        g = beta = None
        if rule.delta or rule.gate != "none":
            g, beta = gate_rows(
                config,
                rule.name,
                small,
                attention.A_log if scalar else None,
                attention.dt_bias if scalar else None,
                retention_gate(config.value_heads, x.device) if rule.gate == "head" else None,
                plan.entry_of,
                plan.chunk_segment,
                v,
            )
        recurrent = before["recurrent_state"].flatten(0, 1)
        o, recurrent, *_ = memory_rule.chunk_fwd(q, k, v, g, beta, recurrent, *plan.segments, attention.scale, 0)
        after = {"recurrent_state": recurrent.view_as(before["recurrent_state"])}
        if config.use_short_conv:
            after["conv_state"] = conv_state.view_as(before["conv_state"])
        new_state.append(after)
        o = combine.combine_fwd(o, weights, plan.slot_of, plan.entry_of).flatten(0, 1)
        if config.use_output_gate:
            gate = (n @ behind(norm, attention.g_proj.weight).t()).view_as(o)
            o = gated_rms_norm.gated_rms_norm_fwd(o, gate, attention.o_norm.weight, eps)
        else:
            o, _ = decode_linear.prepare(o, attention.o_norm.weight, None, True, eps)
        x = x + o.view(ids.shape[0], -1) @ attention.o_proj.weight.t()
        n, _ = decode_linear.prepare(x, None, None, True, eps)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        halves = n @ behind(layer.mlp_norm.weight, gate_up).t()
        x = x + decode_linear.combine_halves(halves) @ mlp.down_proj.weight.t()
    last, _ = decode_linear.prepare(x, model.model.norm.weight, None, True, eps)
    return last @ model.lm_head.weight.t(), new_state


CASES = [
    ("gated_delta", "default"),
    ("gated_delta", "gva-all-memories"),
    ("mamba2", "single-kv-no-conv"),
    ("delta", "default"),
    ("retention", "no-shared"),
    ("linear", "one-memory"),
]


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_a_prefill_out_of_the_kernels_equals_the_model(rule: str, variant: str) -> None:
    model = tiny_model(rule, **{"num_hidden_layers": 1, **VARIANTS[variant]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
        ids, bounds = torch.randint(0, 50, (75,)), torch.tensor([0, 70, 75])
        state: State = [dict(layer) for layer in model.init_state(2)]
        for part in state:
            for name in part:
                part[name] = 0.1 * torch.randn_like(part[name])
        expected = model(ids[None], state=state, cu_seqlens=bounds)
        logits, after = prefill(model, ids, bounds, state)
    assert_close(logits, expected.logits[0], 2e-5, "logits")
    for ours, theirs in zip(after, expected.state, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], 2e-5, name)


def test_the_table_is_that_of_real_launches(tmp_path: Path) -> None:
    """What the GPU test writes for its C++ program: ragged, with an unused chunk."""
    config = tiny_model("mamba2", num_hidden_layers=1).config
    chunks = rows_bound(70, config.topk, 2, config.num_memories, config.shared_mem) // CHUNK + 1
    cases = [
        (function, (2, chunks, 70) if len(function.units) > 1 else (3, 0, 0))
        for function in prefill_functions(config, FLOAT32)
    ]
    count = write_cases(tmp_path / "cases", cases, 86, "cuda" if ON_GPU else "cpu")
    assert count == len(cases) + 24  # functions and launches: dispatch six, the rule four, conv_qkv two


def test_the_order_names_every_function() -> None:
    for rule, variant in CASES:
        config = tiny_model(rule, **VARIANTS[variant]).config
        for function in prefill_functions(config, FLOAT32):
            assert function.name.replace(f"_{rule}", "_RULE") in ORDER
