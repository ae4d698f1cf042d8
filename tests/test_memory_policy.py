"""Memory policies: the same gradients from less memory, eagerly and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import VARIANTS, tiny_model, tokens
from support import TOLERANCES, relative
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mom_compile import MoMForCausalLM
from mom_compile.ops import RULES

POLICIES = ("save", "selective", "block")
BACKEND = "aot_eager_decomp_partition"  # the partitioner of inductor, without its code generation


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


class _Storages(TorchDispatchMode):
    """Every storage that an operator returned, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def _kept_eagerly(model: MoMForCausalLM, ids: Tensor) -> int:
    """Bytes that live after the forward, held by the loss alone."""
    with _Storages() as storages:
        loss = model(ids, labels=ids).loss
    assert loss is not None
    return storages.alive()


def _kept_compiled(run: Callable[..., Any], model: MoMForCausalLM, inputs: dict[str, Any]) -> int:
    """Bytes of the tensors that autograd saves, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(**inputs)
    return sum(size for size, _ in saved.values())


def _gradients(model: MoMForCausalLM, run: Callable[..., Any], autocast: bool = False, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        out = run(**inputs)
    total = out.loss + sum(x.square().mean() for layer in out.state for x in layer.values())
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _inputs(model: MoMForCausalLM, packed: bool = False) -> dict[str, Any]:
    if packed:
        ids = tokens(1, 150)
        return {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 40, 40, 150])}
    ids = tokens(2, 100)
    with torch.no_grad():
        state = model(tokens(2, 9)).state
    return {"input_ids": ids, "labels": ids, "state": state, "attention_mask": (torch.arange(100) > 7).expand(2, 100)}


def _check_policies(model: MoMForCausalLM, inputs: dict[str, Any]) -> None:
    model.set_memory_policy("save")
    expected = _gradients(model, model, **inputs)
    for policy in ("selective", "block"):
        model.set_memory_policy(policy)
        for actual, wanted in zip(_gradients(model, model, **inputs), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_bit_equal(rule: str) -> None:
    model = tiny_model(rule).train()
    _check_policies(model, _inputs(model))
    _check_policies(model, _inputs(model, packed=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_variants_are_bit_equal(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant]).train()
    _check_policies(model, _inputs(model))


def test_gradients_under_autocast_are_bit_equal() -> None:
    model = tiny_model().train()
    _check_policies(model, _inputs(model) | {"autocast": True})


def test_backward_inside_autocast() -> None:
    """The operators' backward takes no part in it."""
    model = tiny_model().train()
    ids, gradients = tokens(2, 50), []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(ids, labels=ids).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < TOLERANCES[torch.bfloat16]


def test_a_random_router_draws_the_same_again() -> None:
    model = tiny_model(num_hidden_layers=1).train()

    def router(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(x[..., :4] + torch.rand(*x.shape[:2], 4), -1)
        return scores.topk(2)

    model.model.layers[0].attn.custom_router = router  # type: ignore[union-attr]
    results = []
    for policy in POLICIES:
        model.set_memory_policy(policy)
        torch.manual_seed(3)
        ids = torch.arange(80).view(2, 40) % 50
        results.append(_gradients(model, model, input_ids=ids, labels=ids))
        torch.rand(1)
    for actual in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(actual, results[0], strict=True))


def test_each_policy_keeps_less_than_the_one_before() -> None:
    model = tiny_model(head_dim=16, hidden_size=64).train()
    ids = tokens(2, 300)
    kept = {}
    for policy in ("auto", *POLICIES):
        model.set_memory_policy(policy)
        kept[policy] = _kept_eagerly(model, ids)
    assert kept["block"] < 0.6 * kept["selective"] and kept["selective"] < 0.6 * kept["save"]
    assert kept["auto"] == kept["save"]
    model.set_memory_policy("selective")
    model.eval()
    assert _kept_eagerly(model, ids) == kept["save"]


def test_a_policy_of_the_first_blocks() -> None:
    model = tiny_model(num_hidden_layers=3, head_dim=16, hidden_size=64).train()
    ids, kept = tokens(2, 300), {}
    model.set_memory_policy("auto")
    expected = _gradients(model, model, input_ids=ids, labels=ids)
    for policy in ("auto", "block:1", "block:2", "block", "block:9", "block:0"):
        model.set_memory_policy(policy)
        kept[policy] = _kept_eagerly(model, ids)
        for actual, wanted in zip(_gradients(model, model, input_ids=ids, labels=ids), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert kept["block"] < kept["block:2"] < kept["block:1"] < kept["auto"]
    assert kept["block:9"] == kept["block"] and kept["block:0"] == kept["auto"]


def test_compiled_blocks() -> None:
    """One graph without breaks; the partitioner keeps what the policy says; the eager gradients."""
    model = tiny_model(num_hidden_layers=2, head_dim=16, hidden_size=64).train()
    inputs = _inputs(model, packed=True)
    model.set_memory_policy("save")
    expected, kept = _gradients(model, model, **inputs), {}
    for policy in POLICIES:
        torch._dynamo.reset()
        counters.clear()
        model.set_memory_policy(policy)
        for block in model.model.layers:
            block.compile(fullgraph=True, backend=BACKEND)
        for actual, wanted in zip(_gradients(model, model, **inputs), expected, strict=True):
            assert torch.allclose(actual, wanted, rtol=1e-3, atol=1e-5)
        kept[policy] = _kept_compiled(model, model, inputs)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # the layers share it
    assert kept["block"] < 0.6 * kept["selective"] and kept["selective"] < 0.6 * kept["save"]


def test_compiled_whole() -> None:
    """The default is selective recomputation, within the graph of the model as well."""
    model = tiny_model(num_hidden_layers=1, head_dim=16, hidden_size=64).train()
    inputs = _inputs(model)
    expected, kept = _gradients(model, model, **inputs), {}
    for policy in ("auto", "block"):
        torch._dynamo.reset()
        model.set_memory_policy(policy)
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
        for actual, wanted in zip(_gradients(model, compiled, **inputs), expected, strict=True):
            assert torch.allclose(actual, wanted, rtol=1e-3, atol=1e-5)
        kept[policy] = _kept_compiled(compiled, model, inputs)
    assert kept["block"] < 0.6 * kept["auto"]
    model.set_memory_policy("save")
    assert kept["auto"] < 0.6 * _kept_eagerly(model, inputs["input_ids"])


def test_one_graph_serves_every_length() -> None:
    model = tiny_model(num_hidden_layers=2).train()
    model.set_memory_policy("selective")
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for batch, length in [(2, 20), (3, 33)]:
        model(tokens(batch, length), labels=tokens(batch, length)).loss.backward()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 2  # the two layers share them
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            ids = tokens(2 + step % 4, 7 + 43 * step)
            model(ids, labels=ids).loss.backward()
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_messages() -> None:
    known = "memory policy must be one of auto, save, selective, block, or one with :N for the first N blocks"
    for policy in ("all", "block:", "block:-1", "block:1.5", "all:3", ""):
        with pytest.raises(ValueError, match=f"{known}, got '{policy}'; save is fastest"):
            tiny_model().set_memory_policy(policy)
