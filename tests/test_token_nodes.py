"""A token of target onnxruntime, masked, touched and transposed, against the model: rules and variants of the layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import VARIANTS, tiny_model, tokens

pytest.importorskip("onnxruntime")

CASES = [
    ("gated_delta", "single-kv-no-conv"),
    ("gated_delta", "gva-all-memories"),
    ("delta", "no-shared"),
    ("mamba2", "single-kv-no-conv"),
    ("retention", "default"),
    ("linear", "single-kv-no-conv"),
    ("linear", "one-memory"),
]


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_a_token(rule: str, variant: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    from mom_compile.export.onnx_artifact import _graph, graph_files, save_graphs

    model = tiny_model(rule, num_hidden_layers=1, **VARIANTS[variant])
    names = [name for name in graph_files(model.config, "onnxruntime", "float16") if name.startswith("decode")]
    assert ("decode_cuda" in names) == (
        rule in ("delta", "gated_delta") and model.config.head_dim == model.config.value_dim
    )
    save_graphs(tmp_path, [(name, name, partial(_graph, model, "onnxruntime", name)) for name in names])
    for name in names:  # ONNX Runtime pads integers on the CPU alone
        nodes = onnx.load(tmp_path / name, load_external_data=False).graph.node
        assert not any(node.op_type == "Pad" and "present.0.touched_index" in node.output for node in nodes)
    ids, before = tokens(3, 1), {name: torch.randn_like(x) for name, x in model.init_state(3)[0].items()}
    with torch.no_grad():
        expected = model(ids, state=(before,))
    past = {f"past_key_values.0.{name}": value.flatten(1, 2).numpy() for name, value in before.items()}
    for graph in names:
        feeds = dict(past)
        if graph == "decode_cuda":
            state = feeds.pop("past_key_values.0.recurrent_state")
            feeds["past_key_values.0.transposed_state"] = state.swapaxes(2, 3)
        session = onnxruntime.InferenceSession(str(tmp_path / graph), providers=["CPUExecutionProvider"])
        results = session.run(None, {"input_ids": ids.numpy(), **feeds})
        outputs = dict(zip((value.name for value in session.get_outputs()), results, strict=True))
        assert np.allclose(outputs["logits"], expected.logits.numpy(), atol=1e-4)
        for name, value in before.items():
            old, new = value.numpy(), expected.state[0][name].numpy()
            if graph == "decode_cuda" and name == "recurrent_state":
                after = outputs["present.0.transposed_state"].reshape(new.shape).swapaxes(3, 4)
            elif graph != "decode_touched":
                after = outputs[f"present.0.{name}"].reshape(new.shape)
            else:
                after, index = old.copy(), outputs["present.0.touched_index"]
                part = outputs[f"present.0.touched_{name.removeprefix('recurrent_')}"]
                after[np.arange(3)[:, None], index] = part.reshape(*index.shape, *new.shape[2:])
            assert np.allclose(after, new, atol=1e-4), (graph, name)
            kept, wanted = ((x == old).reshape(3, old.shape[1], -1).all(2) for x in (after, new))
            assert np.array_equal(kept, wanted), (graph, name)  # not selected: the same bits
