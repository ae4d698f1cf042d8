"""float16 graphs on onnxruntime's CUDA provider beside a decode session of PyTorch: tokens, a prefill, nodes, rules.

    python benchmarks/onnx_gpu.py [--form kernels] [--folder FOLDER] [--size 512m] [--layers 4] [--batch 1 16]
    python benchmarks/onnx_gpu.py [--form kernels] --export FOLDER [--size 512m] [--layers 4]

Needs onnxruntime-gpu and a CUDA GPU, and no network. --form kernels: the graphs of --to onnxruntime-cuda, whose nodes
are the model's own Triton kernels, in the place of those of onnxruntime's own operators; it needs g++ and onnxruntime's
headers. Without a folder the graphs are exported first, some seconds a layer; --export writes them on a machine without
a GPU (--layers 24: minutes), and --folder takes them from there. The weights are random. Every limit is a ratio to
PyTorch in the same run: with few layers, of the layers alone as well, which is the time less that of the same model
without layers.

Decode runs with one buffer for past and present, with and without a CUDA graph; nodes on the CPU, copies between
devices, kernels of a token and the longest of them are named, and the first token's logits compared. Then the memory
rule alone: LinearAttention beside GatedDeltaNet. What fails becomes a row. --provider cpu checks the script itself,
with --size tiny. Medians of one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.bench.report import Table
from mom_compile.bench.sizes import size
from mom_compile.decode import DecodeSession
from mom_compile.export._onnxruntime import exact_providers, fit_linear_attention, require_onnxruntime
from mom_compile.export.onnx_artifact import _graph, save_graphs
from mom_compile.export.onnx_cuda_artifact import write_kernel_graphs
from mom_compile.export.onnx_runner import KERNELS_FOLDER
from mom_compile.export.operator_library import CUDA_OPERATORS
from mom_compile.export.precision import lower_precision

COLUMNS = {"what": 22, "form": 30, "batch": 5, "ms": 9, "times_ours": 10, "times_ours_per_layer": 20, "note": 0}
NEVER = ("MemcpyToHost", "MemcpyFromHost", "If", "Loop", "Scan")
KERNELS = 25  # that are named
DECODES = {"stock": ("decode", "decode_touched", "decode_cuda"), "kernels": ("decode",)}
# Operators without a kernel of their own: their output is the memory of their input.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512m", help="a model of mom-compile bench")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--form", choices=list(DECODES), default="stock")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="only write the graphs there")
    parser.add_argument("--folder", type=Path, help="graphs that --export wrote")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="a CSV")
    args = parser.parse_args()
    config = replace(size(args.size), num_hidden_layers=args.layers)
    if args.export:
        _export(config, args.export, args.form)
        return
    runtime = require_onnxruntime()
    wanted = f"{args.provider.upper()}ExecutionProvider"
    if wanted not in runtime.get_available_providers():
        raise SystemExit("needs the CUDA provider: pip uninstall -y onnxruntime, then pip install onnxruntime-gpu")
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        if args.folder is None:
            _export(config, folder, args.form)
        else:
            config = MoMConfig.from_dict(json.loads((folder / "config.json").read_text()))
        _measure(runtime, folder, config, args)


def _export(config: MoMConfig, folder: Path, form: str) -> None:
    """The float16 graphs and the configuration."""
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(config)

    def make(graph: str) -> Any:
        return lower_precision(_graph(model, "onnxruntime", graph), "float16")

    graphs = (*DECODES[form], "prefill")
    if form == "stock":
        save_graphs(folder, [(graph, f"{graph}.onnx", partial(make, graph)) for graph in graphs])
    else:
        architecture = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        write_kernel_graphs(model, folder, "float16", [10 * architecture[0] + architecture[1]], graphs)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    print(f"exported in {time.perf_counter() - begin:.0f} s", flush=True)


def _model(config: MoMConfig) -> MoMForCausalLM:
    torch.manual_seed(0)
    return MoMForCausalLM(config).eval()


def _measure(runtime: Any, folder: Path, config: MoMConfig, args: argparse.Namespace) -> None:
    device = torch.device(args.provider)
    gpu = device.type == "cuda"
    fit_linear_attention(config.head_dim, config.value_dim)
    name = torch.cuda.get_device_name() if gpu else "CPU"
    versions = f"onnxruntime {runtime.__version__}, torch {torch.__version__}"
    layers = config.num_hidden_layers
    common = {"device": name, "versions": versions, "model": f"{layers} layers of {args.size}"}
    table = Table(COLUMNS, common, args.out)
    model = _model(config).to(device, torch.float16 if gpu else torch.float32)
    bare = _model(replace(config, num_hidden_layers=1)).to(device, model.lm_head.weight.dtype)
    bare.model.layers = torch.nn.ModuleList()  # what a token costs beside its layers
    runs = partial(_run, runtime, folder, device)

    for batch in args.batch:
        with _told(table, "decode", "all", batch):
            _decode(table, runs, model, bare, batch, args, gpu, names=batch == args.batch[0])
    what, ids = f"prefill of {args.prefill}", torch.randint(0, config.vocab_size, (1, args.prefill), device=device)
    ours = float("nan")
    with _told(table, what, "PyTorch", 1), torch.no_grad():
        ours = _median(lambda: model(ids), 10, gpu)
        table.add(what=what, form="PyTorch", batch=1, ms=ours)
    for fixed in (False, True):  # without a fixed length shapes are computed at run time, on the CPU
        form = f"prefill{_of_kernels(args)}{', length fixed' if fixed else ''}"
        with _told(table, what, form, 1):
            run = runs("prefill", 1, args.prefill, fixed=fixed)
            ms = _median(run.call, 10, gpu)
            note = _placement(runs("prefill", 1, args.prefill, fixed=fixed, profile=True), layers)
            table.add(what=what, form=form, batch=1, ms=ms, times_ours=ms / ours, note=note)
            print(f"    {note}", flush=True)
            if gpu:
                _print_kernels(run.call)
    if args.form == "stock":
        _rules(table, config, args, gpu)
    for batch in args.batch if gpu else ():  # for comparison with other tables: the dtype that they have
        with _told(table, "decode", "PyTorch, bfloat16", batch):
            session = DecodeSession(model.bfloat16(), batch)
            token = torch.zeros(batch, dtype=torch.int64, device=device)
            ms = _median(partial(session.step, token), args.steps, gpu)
            table.add(what="decode", form="PyTorch, bfloat16", batch=batch, ms=ms)


def _decode(
    table: Table,
    runs: Callable[..., _Run],
    model: MoMForCausalLM,
    bare: MoMForCausalLM,
    batch: int,
    args: argparse.Namespace,
    gpu: bool,
    names: bool,
) -> None:
    """Tokens of one batch size; ``names``: also where the nodes run, and which kernels do."""
    token = torch.zeros(batch, dtype=torch.int64, device=model.lm_head.weight.device)
    session = DecodeSession(model, batch)
    logits = session.step(token).detach().flatten().cpu().float().clone()
    ours = _median(partial(session.step, token), args.steps, gpu)
    rest = _median(_head(bare, token), args.steps, gpu)
    table.add(what="decode", form="PyTorch, DecodeSession", batch=batch, ms=ours, note=f"without layers {rest:.4f}")
    if gpu and names:
        _print_kernels(partial(session.step, token))
    for graph, captured in itertools.product(DECODES[args.form], (False, True) if gpu else (False,)):
        form = f"{graph}{_of_kernels(args)}{', CUDA graph' if captured else ''}"
        with _told(table, "decode", form, batch):  # a provider that lacks something is an answer
            run = runs(graph, batch, 1, captured)
            run.call()
            run.reset()  # a capture runs more than once
            run.call()
            error = (torch.from_numpy(run.logits.numpy()).flatten() - logits).abs().max() / logits.abs().max()
            ms = _median(run.call, args.steps, gpu)
            notes = [f"logits off by {error:.1e}"]
            if names and not captured:
                notes.append(_placement(runs(graph, batch, 1, profile=True), model.config.num_hidden_layers))
            table.add(
                what="decode", form=form, batch=batch, ms=ms, times_ours=ms / ours,
                times_ours_per_layer=(ms - rest) / (ours - rest), note="; ".join(notes),
            )  # fmt: skip
            print(f"    {'; '.join(notes)}", flush=True)
            if captured:
                _print_kernels(run.call)


@contextmanager
def _told(table: Table, what: str, form: str, batch: int) -> Iterator[None]:
    """A failure becomes a row, and the rest is measured."""
    try:
        yield
    except Exception as error:
        table.add(what=what, form=form, batch=batch, note=f"failed: {type(error).__name__}: {str(error)[:300]}")
        traceback.print_exc(limit=-3)


def _head(model: MoMForCausalLM, token: torch.Tensor) -> Callable[[], Any]:
    """Embedding, norm and logits, as a CUDA graph on a GPU."""

    def call() -> Any:
        with torch.no_grad():
            return model.lm_head(model.model.norm(model.model.embeddings(token)))

    if not token.is_cuda:
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _Run(NamedTuple):
    """A graph with everything bound on the device, past and present in one buffer."""

    call: Callable[[], None]
    reset: Callable[[], None]  # to a state of zeros
    session: Any
    logits: Any


def _run(
    runtime: Any,
    folder: Path,
    device: torch.device,
    name: str,
    batch: int,
    length: int,
    captured: bool = False,
    profile: bool = False,
    fixed: bool = True,
) -> _Run:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = profile
    library = folder / KERNELS_FOLDER / CUDA_OPERATORS.file
    if library.is_file():
        options.register_custom_ops_library(str(library))
    options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    sizes = {"batch": batch, "sequence": length}
    for axis in sizes if fixed else ("batch",):
        options.add_free_dimension_override_by_name(axis, sizes[axis])  # no shape is computed at run time
    providers = exact_providers([f"{device.type.upper()}ExecutionProvider"], {"enable_cuda_graph": str(int(captured))})
    session = runtime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=providers)
    binding, values = session.io_binding(), {}
    dtypes = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    for value in (*session.get_inputs(), *session.get_outputs()):
        key = value.name.replace("present.", "past_key_values.")
        if key not in values:
            shape = [sizes.get(axis, axis) for axis in value.shape]
            array = np.zeros(shape, dtypes[value.type])
            values[key] = runtime.OrtValue.ortvalue_from_numpy(array, device.type, 0)
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, values[value.name])
    for value in session.get_outputs():
        binding.bind_ortvalue_output(value.name, values[value.name.replace("present.", "past_key_values.")])

    def reset() -> None:
        for name, value in values.items():
            if name.startswith("past_key_values."):
                value.update_inplace(np.zeros(value.shape(), np.float32))

    return _Run(lambda: session.run_with_iobinding(binding), reset, session, values["logits"])


def _placement(run: _Run, layers: int) -> str:
    """From a profile: nodes that are no views, and those that a CUDA graph cannot hold."""
    run.call()
    run.call()
    events = json.loads(Path(run.session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    found = Counter(f"{node['op_name']} {node['provider']}" for node in nodes if node["op_name"] not in VIEWS)
    count = sum(found.values()) // 2  # of two runs
    bad = {name: n // 2 for name, n in found.items() if name.split()[0] in NEVER or "CPU" in name}
    copies = sum(n for name, n in bad.items() if name.startswith("Memcpy"))
    return f"{count} nodes, {count / layers:.1f} a layer; Memcpy {copies}; on the CPU or copied: {bad or 'nothing'}"


def _of_kernels(args: argparse.Namespace) -> str:
    """What the name of a form says of the artifact."""
    return " of kernels" if args.form == "kernels" else ""


def _print_kernels(call: Callable[[], Any]) -> None:
    """Kernels of one call and those that take longest, by CUDA's own profiler."""
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_type == torch.profiler.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events)
    print(f"    {sum(event.count for event in events)} kernels and copies, {busy:.0f} us in them")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:KERNELS]:
        name = re.sub(r"\(anonymous namespace\)::|^void |onnxruntime::|contrib::|cuda::", "", event.key)
        print(f"    {event.self_device_time_total:9.1f} us in {event.count:4} of {name[:80]}", flush=True)


def _rules(table: Table, config: MoMConfig, args: argparse.Namespace, gpu: bool) -> None:
    """The memory rule of one layer, all memories and the touched ones."""
    from linear_attention import rules  # beside this file

    heads, memories = config.value_heads, config.total_memories
    touched = config.topk + config.shared_mem
    cases = [(batch, 1, count * heads) for batch in args.batch for count in (memories, touched)]
    cases.append((1, args.prefill, memories * heads))
    forms = ("LinearAttention", "GatedDeltaNet", "GatedDeltaNet, transposed")
    for batch, length, count in cases:
        what = f"rule, T {length}, h {count}"
        with _told(table, what, "all", batch):
            for form, call in zip(forms, rules(batch, length, count, config.head_dim, gpu), strict=True):
                table.add(what=what, form=form, batch=batch, ms=_median(call, 20, gpu))


def _median(call: Callable[[], Any], count: int, gpu: bool) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(count):
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
