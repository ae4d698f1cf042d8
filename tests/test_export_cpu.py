"""The operators of ``cpp/mom_cpu.cpp`` in onnxruntime: held to the model in float64, in every form of the layer."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VARIANTS, tiny_config, tiny_model, tokens
from numpy.typing import NDArray

from mom_compile import MoMForCausalLM, export
from mom_compile.export.artifact import read_manifest, write_manifest
from mom_compile.export.cpu_graphs import decode_cpu_graph, prefill_cpu_graph
from mom_compile.export.onnx_artifact import graph_files
from mom_compile.export.onnx_runner import FUSED_GRAPHS
from mom_compile.export.operator_library import CPU_OPERATORS, add_cpu_operators
from mom_compile.ops import RULES

onnxruntime = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
TOLERANCE = 5e-6
HEADERS = "needs g++ and ONNX Runtime's C++ headers: set ONNXRUNTIME_INCLUDE, see .ci/onnxruntime-headers"

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operators")
    add_cpu_operators(folder)
    if CPU_OPERATORS.missing(folder):
        pytest.skip(HEADERS)
    return folder / CPU_OPERATORS.file


def _session(model: MoMForCausalLM, folder: Path, library: Path, graph: str = "decode") -> Any:
    make = decode_cpu_graph if graph == "decode" else prefill_cpu_graph
    ir.save(make(model), folder / f"{FUSED_GRAPHS[graph]}.onnx")
    return _open(folder / f"{FUSED_GRAPHS[graph]}.onnx", library)


def _open(graph: Path, library: Path, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _feeds(ids: torch.Tensor, state: Sequence[Any]) -> Arrays:
    feeds = {"input_ids": ids.numpy()}
    for layer, values in enumerate(state):
        feeds |= {f"past_key_values.{layer}.{name}": x.flatten(1, 2).float().numpy() for name, x in values.items()}
    return feeds


def _run(session: Any, feeds: Arrays) -> Arrays:
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def _run_in_place(session: Any, feeds: Arrays) -> Arrays:
    """Every present state in the memory of its past one."""
    feeds = {name: value.copy() for name, value in feeds.items()}
    outputs = {name.replace("past_key_values", "present"): value for name, value in feeds.items() if "." in name}
    vocabulary = session.get_outputs()[0].shape[2]
    outputs["logits"] = np.zeros((*feeds["input_ids"].shape, vocabulary), np.float32)
    binding = session.io_binding()
    values = {
        id(array): onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (*feeds.values(), outputs["logits"])
    }
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, values[id(array)])
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, values[id(array)])
    session.run_with_iobinding(binding)
    return outputs


def _random_state(model: MoMForCausalLM, batch: int) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple(
        {name: 0.3 * torch.randn_like(value) for name, value in layer.items()} for layer in model.init_state(batch)
    )


@torch.no_grad()
def _check(model: MoMForCausalLM, session: Any, batch: int, length: int = 1, tolerance: float = TOLERANCE) -> None:
    """Tokens from a random state, against the model in float64."""
    ids, state = tokens(batch, length, model.config.vocab_size), _random_state(model, batch)
    exact = model.double()
    expected = exact(ids, state=[{name: value.double() for name, value in layer.items()} for layer in state])
    model.float()
    want = {"logits": expected.logits} | {
        f"present.{layer}.{name}": value.flatten(1, 2)
        for layer, values in enumerate(expected.state)
        for name, value in values.items()
    }
    actual = _run(session, _feeds(ids, state))
    assert actual.keys() == want.keys()
    for name, value in want.items():
        error = np.linalg.norm(actual[name] - value.numpy()) / np.linalg.norm(value.numpy())
        assert error < tolerance, (name, error)  # false where it is not finite


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_the_models(rule: str, variant: str, tmp_path: Path, library: Path) -> None:
    model = tiny_model(rule, **VARIANTS[variant])
    session = _session(model, tmp_path, library)
    for batch in (1, 5):
        _check(model, session, batch)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefill_is_the_models(rule: str, variant: str, tmp_path: Path, library: Path) -> None:
    """Of few tokens some memories get none; 700 are more than the operator holds at once."""
    model = tiny_model(rule, **VARIANTS[variant])
    session = _session(model, tmp_path, library, "prefill")
    for batch, length in ((1, 1), (3, 2), (2, 65), (1, 700)):
        _check(model, session, batch, length)


@pytest.mark.parametrize("rule", ["gated_delta", "delta", "mamba2", "linear"])
def test_the_matrix(rule: str, tmp_path: Path, library: Path) -> None:
    """Of all targets, as benchmarks/export_matrix.py has it, of one layer each."""
    sizes = ((1, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 3), (4, 3))
    for (memories, topk), shared, convolution in itertools.product(sizes, (False, True), (False, True)):
        changes = {"num_memories": memories, "topk": topk, "shared_mem": shared, "use_short_conv": convolution}
        model = tiny_model(rule, num_hidden_layers=1, **changes)
        _check(model, _session(model, tmp_path, library), 3)
        _check(model, _session(model, tmp_path, library, "prefill"), 2, 70)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 37, "head_dim": 11, "intermediate_size": 301, "vocab_size": 519},  # nothing is a multiple
        {"num_heads": 1, "head_dim": 256, "conv_size": 2},
        {"head_dim": 3, "expand_v": 5, "conv_size": 9},
        {"num_memories": 8, "topk": 8, "num_heads": 3, "num_v_heads": 6},
        {"hidden_size": 2, "num_heads": 1, "head_dim": 1, "intermediate_size": 1},
        {"tie_word_embeddings": True},
    ],
)
def test_odd_sizes(changes: dict[str, Any], tmp_path: Path, library: Path) -> None:
    model = tiny_model(**changes)
    prefill, session = (_session(model, tmp_path, library, graph) for graph in FUSED_GRAPHS)
    for batch in (1, 2, 3, 4, 9):
        _check(model, session, batch)
        _check(model, prefill, batch, 5)


@pytest.mark.parametrize("case", ["beta near 1", "strong decay", "no decay", "large logits", "equal keys"])
def test_hostile_values(case: str, tmp_path: Path, library: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        for block in model.model.layers:
            attention: Any = block.attn
            if case == "beta near 1":
                attention.b_proj.mul_(100)
            elif case == "strong decay":
                attention.A_log.fill_(8)
                attention.dt_bias.fill_(30)
            elif case == "no decay":
                attention.dt_bias.fill_(-200)
            elif case == "large logits":
                attention.router.weight.mul_(1e3)
            else:
                attention.kv_proj[:, : attention.key_size] = 1
                attention.conv1d.fill_(1)
    _check(model, _session(model, tmp_path, library), 4)
    # Equal keys: PyTorch in float32 is up to 7e-5 off there, by the tokens.
    tolerance = 1e-4 if case == "equal keys" else TOLERANCE
    _check(model, _session(model, tmp_path, library, "prefill"), 2, 150, tolerance)


def test_ties_go_to_the_lowest_memory(tmp_path: Path, library: Path) -> None:
    model = tiny_model(num_memories=6, topk=3)
    with torch.no_grad():
        for block in model.model.layers:
            block.attn.router.weight.zero_()  # type: ignore[operator,union-attr]
    session = _session(model, tmp_path, library)
    _check(model, session, 2)
    feeds = _feeds(tokens(2, 1), _random_state(model, 2))
    before = feeds["past_key_values.0.recurrent_state"].reshape(2, 7, -1)
    after = _run(session, feeds)["present.0.recurrent_state"].reshape(2, 7, -1)
    assert [bool((before[:, m] == after[:, m]).all()) for m in range(7)] == [False] * 3 + [True] * 3 + [False]


def test_a_router_that_is_not_finite_harms_its_row_alone(tmp_path: Path, library: Path) -> None:
    model = tiny_model()
    session, state = _session(model, tmp_path, library), _random_state(model, 2)
    ids = tokens(2, 1)
    clean = _run(session, _feeds(ids, state))
    state[0]["recurrent_state"][0] = torch.nan
    found = _run(session, _feeds(ids, state))
    assert np.isnan(found["logits"][0]).all() and (found["logits"][1] == clean["logits"][1]).all()


@pytest.mark.parametrize(("graph", "length"), [("decode", 1), ("prefill", 1), ("prefill", 40)])
@pytest.mark.parametrize("batch", [1, 6])
def test_bits(graph: str, length: int, batch: int, tmp_path: Path, library: Path) -> None:
    """In place or not, with one thread or three, again and again: the same; and what a token leaves alone stays."""
    model = tiny_model(hidden_size=300, head_dim=64, vocab_size=700)
    one = _session(model, tmp_path, library, graph)
    three = _open(tmp_path / f"{FUSED_GRAPHS[graph]}.onnx", library, threads=3)
    feeds = _feeds(tokens(batch, length), _random_state(model, batch))
    expected = _run(one, feeds)
    for session in (one, three):
        for _ in range(10):
            for found in (_run(session, feeds), _run_in_place(session, feeds)):
                assert found.keys() == expected.keys()
                assert all((found[name] == value).all() for name, value in expected.items())
    memories = model.config.total_memories
    for name, value in feeds.items():
        if "." in name and length == 1:
            old = value.reshape(batch, memories, -1)
            new = expected[name.replace("past_key_values", "present")].reshape(batch, memories, -1)
            same = (old == new).all(-1).sum(-1)
            assert (same == model.config.num_memories - model.config.topk).all()


def test_rows_do_not_depend_on_their_batch(tmp_path: Path, library: Path) -> None:
    model = tiny_model()
    session, state, ids = _session(model, tmp_path, library), _random_state(model, 7), tokens(7, 1)
    together = _run(session, _feeds(ids, state))
    for row in range(7):
        alone = [{name: value[row : row + 1] for name, value in layer.items()} for layer in state]
        found = _run(session, _feeds(ids[row : row + 1], alone))
        for name, value in found.items():
            np.testing.assert_allclose(value[0], together[name][row], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path, library: Path) -> None:
    import onnx

    model = tiny_model(num_hidden_layers=1)
    session = _session(model, tmp_path, library)
    feeds = _feeds(tokens(2, 1), _random_state(model, 2))
    feeds["past_key_values.0.recurrent_state"] = feeds["past_key_values.0.recurrent_state"][:1]
    with pytest.raises(Exception, match=r"the recurrent state must be \[2, 10, 8, 8\], got \[1, 10, 8, 8\]"):
        session.run(None, feeds)
    graph = onnx.load(str(tmp_path / "decode_cpu.onnx"))
    (layer,) = (node for node in graph.graph.node if node.op_type == "DecodeLayer")

    def refused(message: str) -> None:
        onnx.save(graph, tmp_path / "other.onnx")
        with pytest.raises(Exception, match=message):
            _run(_open(tmp_path / "other.onnx", library), _feeds(tokens(2, 1), _random_state(model, 2)))

    (rule,) = (attribute for attribute in layer.attribute if attribute.name == "rule")
    rule.s = b"mamba3"
    refused("rule must be known to this library, got mamba3")
    rule.s = b"linear"
    refused("small must have 4 columns, got 24; ")
    rule.s = b"gated_delta"
    given = layer.input[6]  # A_log
    layer.input[6] = ""
    refused(r"A_log must be \[2\], got none")
    layer.input[6] = given
    next(attribute for attribute in layer.attribute if attribute.name == "topk").i = 5
    refused(r"topk must lie in \[1, memories\], got 5 of 4")


# ---- the artifact ----------------------------------------------------------------------------------------------------


def test_the_artifact(small_artifact: tuple[MoMForCausalLM, Path], library: Path) -> None:
    """It verifies, shares the file's weights, and is what a runner takes for few sequences."""
    import onnx

    model, folder = small_artifact
    runner = export.load(folder)
    assert {"fused layers", "fused layers, two buffers"} <= runner.decode_ways().keys()
    assert runner.prefill_ways().keys() == {"", "fused layers"}
    places: dict[str, set[str]] = {}
    for name in (*FUSED_GRAPHS, *FUSED_GRAPHS.values()):
        graph = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False).graph
        stored = [{entry.key: entry.value for entry in value.external_data} for value in graph.initializer]
        places[name] = {entry["offset"] for entry in stored if entry}
    for plain, name in FUSED_GRAPHS.items():
        assert places[name] <= places[plain] | places["prefill"]
    _, state = runner(tokens(2, 70, 256))
    steps = {
        "by default": runner.decode_loop(state, 2),
        "fused": runner.decode_loop(state, 2, fused=True, aliased=True),
        "two buffers": runner.decode_loop(state, 2, fused=True),
    }
    own = export.load(folder, fused=False).decode_loop(state, 2)
    for _ in range(5):
        ids = tokens(2, 1, 256)[:, 0].numpy()
        want = own(ids).copy()
        found = {name: step(ids).copy() for name, step in steps.items()}
        assert all((logits == found["fused"]).all() for logits in found.values())
        assert (want != found["fused"]).any()  # another graph, other bits
        np.testing.assert_allclose(found["fused"], want, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="only one of fused, touched and transposed must be True, got two"):
        runner.decode_loop(state, 2, fused=True, touched=True)


def test_without_the_library(small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    """The folder runs as before, and says how to build it."""
    _, source = small_artifact
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    runner = export.load(source)
    expected = [int(token[0]) for token in runner.generate([[84, 104, 101]], 20, eos_token_id=-1)]
    manifest = read_manifest(source)
    (folder / CPU_OPERATORS.file).unlink(missing_ok=True)
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "files"})
    without = export.load(folder)
    assert [int(token[0]) for token in without.generate([[84, 104, 101]], 20, eos_token_id=-1)] == expected
    assert "fused layers" not in without.decode_ways()
    assert "in its folder run: g++ -std=c++17 -O3" in without.not_run()["fused layers"]
    with pytest.raises(ImportError, match="must exist, got no such file; in its folder run: g[+][+]"):
        without.decode_loop(without.init_state(1), 1, fused=True)
    report = export.verify(folder)
    assert report.passed and "fused layers, not run on this machine" in str(report)


def test_a_library_of_another_system(small_artifact: tuple[MoMForCausalLM, Path], tmp_path: Path) -> None:
    _, source = small_artifact
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    (folder / CPU_OPERATORS.file).write_bytes(b"not a library")
    write_manifest(folder, {name: value for name, value in read_manifest(source).items() if name != "files"})
    with pytest.raises(
        ImportError, match=r"must load here, got .*; in its folder run: g\+\+ .*, or load with fused=False"
    ):
        export.load(folder)(tokens(1, 3))
    export.load(folder, fused=False)(tokens(1, 3))


def test_artifacts_that_have_none(tmp_path: Path) -> None:
    """Below float32; the error says which have it."""
    fused = set(FUSED_GRAPHS.values())
    assert not fused & graph_files(tiny_config(), "onnxruntime", "float16").keys()
    assert not fused & graph_files(tiny_config(), "onnxruntime", "float32", "bfloat16").keys()
    assert not fused & graph_files(tiny_config(), "portable").keys()
    export.to_onnx(tiny_model(num_hidden_layers=1), tmp_path / "a", target="portable")
    runner = export.load(tmp_path / "a")
    message = "fused must be False for this artifact, got True; .* in float32"
    with pytest.raises(ValueError, match=message):
        runner.decode_loop(runner.init_state(1), 1, fused=True)
    with pytest.raises(ValueError, match=message):
        export.load(tmp_path / "a", fused=True)
