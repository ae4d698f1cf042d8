from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VARIANTS, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file

from mom_compile.state import State
from mom_compile.state_ops import batch_size, fork_state, load_state, save_state, select_rows

DEVICE = torch.get_default_device()


def assert_equal(a: State, b: State) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_keeps_the_state(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    state = model(tokens(2, 9), state=model.init_state(2, dtype=torch.bfloat16)).state
    save_state(state, tmp_path / "state.safetensors", model.config)
    loaded = load_state(tmp_path / "state.safetensors", model.config, DEVICE)
    assert_equal(loaded, state)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@torch.no_grad()
def test_a_prefix_serves_many_continuations() -> None:
    model = tiny_model()
    prefix, suffix = tokens(1, 20), tokens(3, 5)
    whole = model.generate(torch.cat([prefix.expand(3, 20), suffix], 1), 6, eos_token_id=-1)[:, 20:]
    forked = fork_state(model(prefix).state, 3)
    assert torch.equal(model.generate(suffix, 6, state=forked, eos_token_id=-1), whole)


@torch.no_grad()
def test_rows() -> None:
    model = tiny_model()
    ids = tokens(3, 9)
    state = model(ids).state
    picked = select_rows(state, [2, 0, 2, 1])
    assert batch_size(picked) == 4
    assert_equal(select_rows(picked, torch.tensor([1, 3, 0])), state)
    assert batch_size(select_rows(state, [])) == 0
    picked[0]["recurrent_state"].zero_()
    assert state[0]["recurrent_state"].any()


def test_messages(tmp_path: Path) -> None:
    model = tiny_model()
    state = model.init_state(2)
    file = tmp_path / "state.safetensors"
    save_state(state, file, model.config)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1, device="cpu")}, str(other))
    later = tmp_path / "later.safetensors"
    save_file(load_file(str(file)), str(later), {"state_layout_version": "2", "config": "{}"})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-9])
    cases = [
        (lambda: load_state(tmp_path / "none", model.config), "must exist, got no such file"),
        (lambda: load_state(other, model.config), "must hold a state, got other tensors"),
        (lambda: load_state(later, model.config), "must have state_layout_version 1, got 2"),
        (lambda: load_state(damaged, model.config), "truncated or damaged"),
        (lambda: load_state(file, tiny_config(num_memories=3)), "with num_memories = 3, got 4; it belongs to another"),
        (lambda: load_state(file, tiny_config("delta")), "with update_rule = .*'delta'.*, got .*'gated_delta'"),
        (lambda: save_state(state, file, tiny_config(head_dim=16)), "must have shape"),
        (lambda: fork_state(state, 3), "state must be of one sequence to be forked, got 2"),
        (lambda: fork_state(model.init_state(1), 0), "rows must be at least 1, got 0"),
        (lambda: select_rows(state, [0, 2]), r"rows must lie in \[0, 2\), got 2"),
        (lambda: select_rows(state, torch.zeros(2)), r"rows must be \[N\] int64, got shape \(2,\) of torch.float32"),
        (lambda: batch_size(()), "state must hold recurrent_state in every layer, got 0 layers"),
        (lambda: model(tokens(3, 1), state=state), "must have shape"),
    ]
    for call, message in cases:
        if DEVICE.type == "cuda" and "lie in" in message:
            continue
        with pytest.raises(ValueError, match=message):
            call()
