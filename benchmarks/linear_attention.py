"""The gated delta rule in onnxruntime: LinearAttention beside GatedDeltaNet, on our sizes.

    python benchmarks/linear_attention.py [--threads 1] [--cuda]

State heads are M' * HV = 5 * 4, as a layer of 4 memories and the shared one has them. GatedDeltaNet keeps its state
V-major: with our layout there is a transposition before and behind it, which the last column has. On the CPU
everything is float32; with --cuda q, k and v of GatedDeltaNet are float16, as LinearAttention has only one dtype, and
states stay on the device. Results are compared before they are timed. Medians of one run; read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

CASES = ((1, 512, 20, 64), (1, 1, 20, 64), (8, 1, 20, 64))
CUDA_CASES = ((1, 1, 20, 256), (1, 1, 12, 256), (16, 1, 20, 256), (16, 1, 12, 256), (1, 2048, 20, 256))
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}")
    print(f"{'B, T, heads, K = V':<22}LinearAttention, ms  GatedDeltaNet  transposed too")
    for case in CUDA_CASES if args.cuda else CASES:
        ms = [_median(call) * 1e3 for call in rules(*case, args.cuda, args.threads)]
        others = "".join(f"{other / ms[0]:14.2f}x" for other in ms[1:])
        print(f"{', '.join(map(str, case)):<22}{ms[0]:19.4f}{others}")


def rules(batch: int, length: int, heads: int, size: int, cuda: bool, threads: int = 1) -> list[Call]:
    """Calls of LinearAttention, of GatedDeltaNet and of that between transpositions of its state, which agree."""
    random = np.random.default_rng(0)
    narrow = np.float16 if cuda else np.float32

    def unit(x: Any) -> Any:
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    shape = (batch, length, heads, size)
    q, k = unit(random.standard_normal(shape)), unit(random.standard_normal(shape))
    v = random.standard_normal(shape).astype(np.float32)
    g, beta = -random.random(shape[:3]).astype(np.float32), random.random(shape[:3]).astype(np.float32)
    state = random.standard_normal((batch, heads, size, size)).astype(np.float32)
    flat = [x.reshape(batch, length, -1) for x in (q, k, v)]
    packed = [x.reshape(batch * length, heads, size).astype(narrow) for x in (q, k, v)]
    gates = [x.reshape(batch * length, heads) for x in (g, beta)]
    bounds = np.arange(batch + 1, dtype=np.int32) * length
    rule = {"update_rule": "gated_delta", "scale": size**-0.5}
    options = {"cuda": cuda, "threads": threads}
    net = [*packed, bounds, *gates]
    attributes = {**rule, "q_num_heads": heads, "kv_num_heads": heads}
    linear = _session("LinearAttention", [*flat, state, g, beta], attributes, **options)
    calls = [
        linear,
        _session("GatedDeltaNet", [*net, state.swapaxes(2, 3).copy()], rule, **options),
        _session("GatedDeltaNet", [*net, state], rule, **options, transposed=True),
    ]
    o, final = linear()
    for call, axes in zip(calls[1:], ((0, 1, 3, 2), (0, 1, 2, 3)), strict=True):
        other, other_final = call()
        tolerance = 2e-2 if cuda else 1e-4
        assert np.allclose(o.reshape(-1), other.reshape(-1), atol=tolerance)
        assert np.allclose(final, other_final.transpose(axes), atol=tolerance)
    return [getattr(call, "only", call) for call in calls]


def _session(
    operator: str,
    arrays: Sequence[Any],
    attributes: dict[str, Any],
    cuda: bool,
    threads: int,
    transposed: bool = False,
) -> Any:
    """A call of a graph of this one operator, its last input ``transposed`` before and its state behind it."""
    names = [f"x{index}" for index in range(len(arrays))]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    narrow = TensorProto.FLOAT16 if arrays[0].dtype == np.float16 else TensorProto.FLOAT
    outputs = [
        helper.make_tensor_value_info(name, dtype, None)
        for name, dtype in (("o", narrow), ("final", TensorProto.FLOAT))
    ]
    node = helper.make_node(operator, names, ["o", "final"], domain="com.microsoft", **attributes)
    nodes = [node]
    if transposed:
        node.input[-1], node.output[-1] = "before", "behind"
        turn = {"perm": [0, 1, 3, 2]}
        nodes = [
            helper.make_node("Transpose", [names[-1]], ["before"], **turn),
            node,
            helper.make_node("Transpose", ["behind"], ["final"], **turn),
        ]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, operator, inputs, outputs)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"})] if cuda else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    feeds = dict(zip(names, arrays, strict=True))
    if not cuda:
        return lambda: session.run(None, feeds)
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for value in outputs:
        binding.bind_output(value.name, "cuda")

    def call() -> Any:
        session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()]

    call.only = lambda: session.run_with_iobinding(binding)  # type: ignore[attr-defined]
    return call


def _median(call: Call, count: int = 30) -> float:
    call()
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
