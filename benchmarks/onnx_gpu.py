"""float16 graphs on onnxruntime's CUDA provider beside a decode session of PyTorch: ms per token, and a prefill.

    python benchmarks/onnx_gpu.py [--hidden 1024] [--layers 4] [--heads 4] [--dim 256] [--vocab 32000] [--batches 1 16]

Needs onnxruntime-gpu and a CUDA GPU. The decode graph runs with one buffer for past and present, with and without a
CUDA graph; nodes that onnxruntime placed on the CPU or copies that it inserted are counted and named. Medians of one
run; read the ratios. Tracing takes some seconds per layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mom_compile import MoMConfig, MoMForCausalLM
from mom_compile.decode import DecodeSession
from mom_compile.export._onnxruntime import require_onnxruntime
from mom_compile.export.onnx_artifact import _graph, save_graphs
from mom_compile.export.precision import lower_precision
from mom_compile.export.program import flat_shapes, state_names

NEVER = ("MemcpyToHost", "MemcpyFromHost", "If", "Loop", "Scan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 4), ("heads", 4), ("dim", 256), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    runtime = require_onnxruntime()
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise SystemExit("needs the CUDA provider: pip uninstall -y onnxruntime, then pip install onnxruntime-gpu")
    torch.manual_seed(0)
    config = MoMConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_heads=args.heads,
        head_dim=args.dim,
    )
    model = MoMForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def make(graph: str) -> Any:
            return lower_precision(_graph(model, "onnxruntime", graph), "float16")

        save_graphs(folder, [(graph, f"{graph}.onnx", partial(make, graph)) for graph in ("decode", "prefill")])
        model = model.to("cuda", torch.float16)
        print(f"onnxruntime {runtime.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
        for batch in args.batches:
            session = DecodeSession(model, batch)
            token = torch.zeros(batch, dtype=torch.int64, device="cuda")
            ours = _median(lambda: session.step(token), args.steps)  # noqa: B023
            print(f"decode, batch {batch:<4} DecodeSession    {ours:8.3f} ms")
            for graph in (False, True):
                label = "onnxruntime graph" if graph else "onnxruntime      "
                try:
                    taken = _median(_decode(runtime, folder, config, batch, graph), args.steps)
                except Exception as error:
                    print(f"decode, batch {batch:<4} {label} failed: {str(error)[:200]}")
                    continue
                print(f"decode, batch {batch:<4} {label}{taken:8.3f} ms  {taken / ours:5.2f}x")
        ids = torch.randint(0, args.vocab, (1, args.prefill), device="cuda")
        with torch.no_grad():
            ours = _median(lambda: model(ids), 10)
        taken = _median(_call(runtime, folder, "prefill", config, 1, args.prefill, False), 10)
        print(f"prefill of {args.prefill}: ours {ours:.2f} ms, onnxruntime {taken:.2f} ms  {taken / ours:5.2f}x")


def _decode(runtime: Any, folder: Path, config: MoMConfig, batch: int, graph: bool) -> Callable[[], None]:
    call = _call(runtime, folder, "decode", config, batch, 1, graph)
    if not graph:
        placed = _placement(runtime, folder, config, batch)
        bad = {name: count for name, count in placed.items() if name.split()[0] in NEVER or "CPU" in name}
        print(f"decode, batch {batch:<4} on the CPU or copied: {bad or 'nothing'}")
    return call


def _call(
    runtime: Any,
    folder: Path,
    name: str,
    config: MoMConfig,
    batch: int,
    length: int,
    graph: bool,
    profile: bool = False,
) -> Callable[[], Any]:
    """A call of a graph with everything bound on the device, past and present in one buffer."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = profile
    options.profile_file_prefix = str(folder / "profile")
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1" if graph else "0"}), "CPUExecutionProvider"]
    session = runtime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=providers)

    def value(array: Any) -> Any:
        return runtime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)

    binding = session.io_binding()
    keep = [value(np.zeros((batch, length), np.int64)), value(np.zeros((batch, length, config.vocab_size), np.float32))]
    binding.bind_ortvalue_input("input_ids", keep[0])
    binding.bind_ortvalue_output("logits", keep[1])
    shapes = flat_shapes(config, batch)
    for layer, state in state_names(config):
        keep.append(value(np.zeros(shapes[state], np.float32)))
        binding.bind_ortvalue_input(f"past_key_values.{layer}.{state}", keep[-1])
        binding.bind_ortvalue_output(f"present.{layer}.{state}", keep[-1])

    def call(kept: Any = keep) -> Any:
        session.run_with_iobinding(binding)
        return session

    return call


def _placement(runtime: Any, folder: Path, config: MoMConfig, batch: int) -> Counter[str]:
    """``operator provider`` -> nodes, from a profile of one step."""
    session = _call(runtime, folder, "decode", config, batch, 1, False, profile=True)()
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = (event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {}))
    return Counter(f"{node['op_name']} {node.get('provider', '')}" for node in nodes)


def _median(call: Callable[[], Any], count: int) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
