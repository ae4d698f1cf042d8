"""The three forms of the layer agree; prefill, decode, padding and packing agree; nothing leaks; states are values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, tiny_config, tiny_model, tokens
from support import assert_close
from torch import Tensor, nn

from mom_compile import MoMAttention, MoMConfig, MoMForCausalLM
from mom_compile.losses import balance_loss, next_token_loss
from mom_compile.ops import RULES
from mom_compile.state import State

TOLERANCE = 2e-5


def assert_states_close(actual: State, expected: State) -> None:
    for layer, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.keys() == e.keys()
        for name in e:
            assert_close(a[name], e[name], TOLERANCE, f"{name} of layer {layer}")


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_forms_agree(rule: str, variant: str) -> None:
    model = tiny_model(rule, **VARIANTS[variant])
    ids = tokens(3, 70)
    packed = model(ids)
    portable = model(ids, form="portable")
    assert_close(portable.logits, packed.logits, TOLERANCE, "portable logits")
    assert_states_close(portable.state, packed.state)
    state = model(ids[:, :60]).state
    pieces = []
    for t in range(60, 70):
        out = model(ids[:, t : t + 1], state=state)
        state = out.state
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), packed.logits[:, 60:], TOLERANCE, "step logits")
    assert_states_close(state, packed.state)
    several = model(ids[:, 60:68], state=model(ids[:, :60]).state, form="step")
    assert_close(several.logits, packed.logits[:, 60:68], TOLERANCE, "eight tokens in one step call")


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "portable"])
@pytest.mark.parametrize("rule", ["gated_delta", "retention"])
def test_prefill_in_pieces(rule: str, form: str) -> None:
    model = tiny_model(rule)
    ids = tokens(2, 150)
    whole = model(ids, form=form)
    state, pieces = model.init_state(2), []
    for start, stop in [(0, 2), (2, 3), (3, 67), (67, 150)]:
        out = model(ids[:, start:stop], state=state, form=form)
        state = out.state
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole.logits, TOLERANCE, "logits")
    assert_states_close(state, whole.state)


@torch.no_grad()
@pytest.mark.parametrize("form", ["packed", "portable"])
@pytest.mark.parametrize("variant", ["default", "single-kv-no-conv"])
def test_padding_equals_the_rows_alone(variant: str, form: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    ids = tokens(3, 70)
    mask = torch.ones(3, 70, dtype=torch.int64)
    mask[0, :13] = 0
    mask[1, 50:] = 0
    out = model(ids, attention_mask=mask, form=form)
    for row, part in ((0, slice(13, 70)), (1, slice(0, 50)), (2, slice(0, 70))):
        alone = model(ids[row : row + 1, part])
        assert_close(out.logits[row : row + 1, part], alone.logits, TOLERANCE, f"row {row}")
        assert_states_close(tuple({k: v[row : row + 1] for k, v in layer.items()} for layer in out.state), alone.state)


@torch.no_grad()
def test_a_masked_row_keeps_its_state_in_the_step() -> None:
    model = tiny_model()
    state = model(tokens(2, 20)).state
    token = tokens(2, 1)
    masked = model(token, state=state, attention_mask=torch.tensor([[1], [0]]))
    full = model(token, state=state, attention_mask=torch.ones(2, 1, dtype=torch.int64))
    free = model(token, state=state)
    for before, after, same, close in zip(state, masked.state, full.state, free.state, strict=True):
        for name in before:
            assert torch.equal(after[name][1], before[name][1])
            assert torch.equal(after[name][0], same[name][0])
            # Without a mask a kernel is compiled apart and may contract other products.
            assert_close(same[name], close[name], 1e-6, name)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_documents_equal_the_documents_alone(rule: str) -> None:
    model = tiny_model(rule)
    ids = tokens(1, 150)
    bounds = [0, 30, 30, 33, 150]
    state = model(tokens(4, 9)).state
    out = model(ids, state=state, cu_seqlens=torch.tensor(bounds))
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        mine = tuple({k: v[n : n + 1] for k, v in layer.items()} for layer in state)
        after = tuple({k: v[n : n + 1] for k, v in layer.items()} for layer in out.state)
        if start == stop:
            assert_states_close(after, mine)
            continue
        alone = model(ids[:, start:stop], state=mine, form="packed")
        assert_close(out.logits[:, start:stop], alone.logits, TOLERANCE, f"document {n}")
        assert_states_close(after, alone.state)


@pytest.mark.parametrize("training", [True, False])
@given(batch=st.integers(1, 3), length=st.integers(2, 140), position=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_no_leak(training: bool, batch: int, length: int, position: float, seed: int) -> None:
    """Bitwise: outputs depend on no later token, and on no other sample."""
    torch.manual_seed(seed)
    model = MoMForCausalLM(tiny_config(num_hidden_layers=1)).train(training)
    ids = tokens(batch, length)
    with torch.no_grad():
        base = model(ids).logits
        cut = max(1, int(position * (length - 1)))
        future = ids.clone()
        future[:, cut:] = (future[:, cut:] + 1 + torch.randint(0, 48, future[:, cut:].shape)) % 50
        assert torch.equal(model(future).logits[:, :cut], base[:, :cut])
        if batch > 1:
            other = ids.clone()
            other[1:] = tokens(batch - 1, length)
            assert torch.equal(model(other).logits[0], base[0])


@torch.no_grad()
def test_states_are_values() -> None:
    model = tiny_model()
    state = model(tokens(2, 30)).state
    copy = tuple({k: v.clone() for k, v in layer.items()} for layer in state)
    first, second = tokens(2, 1), tokens(2, 1)
    a1 = model(first, state=state)
    b1 = model(second, state=state)
    model(tokens(2, 20), state=state)
    model(tokens(2, 20), state=state, form="portable")
    for layer, saved in zip(state, copy, strict=True):
        assert all(torch.equal(layer[name], saved[name]) for name in saved)
    a2 = model(first, state=state)
    assert torch.equal(a1.logits, a2.logits)
    both = model(torch.cat([first[:1], second[:1]]), state=tuple({k: v[[0, 0]] for k, v in s.items()} for s in state))
    assert_close(both.logits, torch.cat([a1.logits[:1], b1.logits[:1]]), TOLERANCE, "forks")


@torch.no_grad()
def test_untouched_memories_stay_bit_identical() -> None:
    model = tiny_model(shared_mem=False, num_hidden_layers=1)
    state = model(tokens(1, 40)).state
    indices = torch.tensor([[[2, 0]]])
    for form in ("step", "packed", "portable"):
        after = model(tokens(1, 1), state=state, router_indices=[indices], form=form).state
        for name in state[0]:
            assert torch.equal(after[0][name][:, [1, 3]], state[0][name][:, [1, 3]])
            assert not torch.equal(after[0][name][:, [0, 2]], state[0][name][:, [0, 2]])


@torch.no_grad()
def test_router_ties_go_to_the_lowest_index_in_every_form() -> None:
    model = tiny_model(num_hidden_layers=1, use_short_conv=False, shared_mem=False)
    model.get_parameter("model.layers.0.attn.router.weight").zero_()
    state = model.init_state(1)
    for form in ("step", "packed", "portable"):
        after = model(tokens(1, 1), state=state, form=form).state[0]["recurrent_state"]
        assert after[:, :2].abs().sum() > 0 and not after[:, 2:].any()


def test_gradients_flow_through_states() -> None:
    model = tiny_model()
    state = tuple({k: torch.randn_like(v).requires_grad_() for k, v in layer.items()} for layer in model.init_state(2))
    for form in ("packed", "portable", "step"):
        out = model(tokens(2, 1 if form == "step" else 9), state=state, form=form)
        leaves = [x for layer in state for x in layer.values()]
        total = sum(x.square().sum() for layer in out.state for x in layer.values()) + out.logits.sum()
        assert all(torch.isfinite(g).all() and g.any() for g in torch.autograd.grad(total, leaves))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_storage_dtype(dtype: torch.dtype) -> None:
    model = tiny_model()
    state = model.init_state(2, dtype=dtype)
    out = model(tokens(2, 20), state=state)
    assert all(layer["recurrent_state"].dtype == dtype for layer in out.state)
    out = model(tokens(2, 1), state=out.state)
    assert all(layer["recurrent_state"].dtype == dtype for layer in out.state)


def test_losses() -> None:
    logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(next_token_loss(logits, labels), expected)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    parts = [(logits[0, 2:5], labels[0, 3:]), (logits[1, :2], labels[1, 1:3])]
    expected = torch.nn.functional.cross_entropy(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))
    assert torch.allclose(next_token_loss(logits, labels, mask), expected)
    packed = next_token_loss(logits[:1], labels[:1], cu_seqlens=torch.tensor([0, 2, 2, 6]))
    keep = [0, 2, 3, 4]
    expected = torch.nn.functional.cross_entropy(logits[0, keep], labels[0, [i + 1 for i in keep]])
    assert torch.allclose(packed, expected)
    uniform = balance_loss([torch.zeros(1, 100, 4)], 2)
    assert torch.allclose(uniform, torch.tensor(2.0))
    half = torch.cat([torch.randn(1, 5, 4), torch.full((1, 5, 4), 99.0)], 1)
    masked = balance_loss([half], 2, torch.tensor([[1] * 5 + [0] * 5]))
    assert torch.allclose(masked, balance_loss([half[:, :5]], 2))


def test_model_loss_is_cross_entropy_plus_balance() -> None:
    model = tiny_model()
    ids = tokens(2, 30)
    out = model(ids, labels=ids, return_logits=True)
    assert out.logits is not None and out.loss is not None and out.aux_loss is not None
    expected = next_token_loss(out.logits, ids) + 0.01 * balance_loss(out.router_logits, 2)
    assert torch.allclose(out.loss, expected)
    assert model(ids, labels=ids).logits is None


class _OwnModel(nn.Module):
    def __init__(self, config: MoMConfig, router=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.embed = nn.Embedding(11, config.hidden_size)
        self.mom = MoMAttention(config, router=router)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mom(self.embed(ids))[0]


def test_custom_router() -> None:
    def first_two(x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:2], 2)
        return torch.full(shape, 0.5), torch.arange(2).expand(shape)

    model = _OwnModel(tiny_config(), first_two)
    y = model(torch.randint(0, 11, (2, 9)))
    y.sum().backward()
    state = model.mom(torch.randn(1, 5, 32))[1]
    assert state["recurrent_state"][:, :2].any() and not state["recurrent_state"][:, 2:4].any()


def test_rule_per_layer() -> None:
    model = tiny_model(["linear", "gated_delta"])
    assert not hasattr(model.model.layers[0].attn, "a_proj") and hasattr(model.model.layers[1].attn, "a_proj")
    assert model(tokens(1, 5)).logits.shape == (1, 5, 50)


def test_autocast() -> None:
    model = tiny_model()
    ids = tokens(2, 40)
    reference = model(ids)
    # bfloat16 may choose other memories where two are nearly equal, so the choices are given.
    expected, indices = reference.logits, [logits.topk(2).indices for logits in reference.router_logits]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = model(ids, labels=ids, return_logits=True, router_indices=indices)
    assert out.logits is not None and out.logits.dtype == torch.bfloat16
    assert out.router_logits[0].dtype == torch.float32 and out.state[0]["recurrent_state"].dtype == torch.float32
    assert_close(out.logits, expected, 5e-2, "bf16 logits")
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_messages() -> None:
    model = tiny_model()
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="state must have one entry for each of the 2 layers, got 1"):
        model(ids, state=model.init_state(2)[:1])
    with pytest.raises(ValueError, match=r"state\[0\]\['conv_state'\] must have shape \(2, 5, 48, 3\), got \(3, 5, 48"):
        model(ids, state=model.init_state(3))
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \(2, 5\), got shape \(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="x must have batch size 1 with cu_seqlens, got 2"):
        model(ids, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="x must have at most 8 tokens for form step, got 9"):
        model(tokens(1, 9), state=model.init_state(1), form="step")
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] int64"):
        model(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids \(2, 5\), got \(2, 4\)"):
        model(ids, labels=ids[:, :4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 5}, r"topk must lie in \[1, num_memories = 4\], got 5; lower topk or raise num_memories"),
        ({"update_rule": "gru"}, "update_rule must be one of linear, retention, .*, got 'gru'; choose one"),
        ({"update_rule": "titans"}, r"got 'titans' \(planned, not there yet\)"),
        ({"update_rule": ["linear"]}, "update_rule must name one rule for each of the 2 layers, got 1"),
        ({"head_dim": 512}, "head_dim must be at most 256, got 512"),
        ({"expand_v": 0.3}, r"expand_v must make head_dim \* expand_v a whole number, got 8 \* 0.3"),
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2, got 3"),
        ({"attn": {"layers": [1]}}, "attn must be None"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
    ],
)
def test_config_messages(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**({"rule": changes.pop("update_rule")} if "update_rule" in changes else {}), **changes)


def test_config_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="config must hold known keys, got hidden_sise; the known ones are"):
        MoMConfig.from_dict({"hidden_sise": 3})
    config = tiny_config()
    assert MoMConfig.from_dict(config.to_dict()) == config


def test_the_state_of_a_loss_carries_no_gradient() -> None:
    model, ids = tiny_model(num_hidden_layers=1).train(), torch.randint(0, 50, (1, 9))
    for labels in (None, ids):
        state = model(ids, labels=labels).state
        assert any(x.requires_grad for layer in state for x in layer.values()) == (labels is None)
