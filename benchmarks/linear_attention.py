"""The gated delta rule in onnxruntime on the CPU: LinearAttention beside GatedDeltaNet with cu_seqlens, on our sizes.

    python benchmarks/linear_attention.py [--threads 1]

State heads are M' * HV = 5 * 4, as a layer of 4 memories and the shared one has them. Results are compared before they
are timed. Medians of one run; read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

CASES = ((1, 512, 20, 64), (1, 1, 20, 64), (8, 1, 20, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    random = np.random.default_rng(0)
    print(f"onnxruntime {onnxruntime.__version__}\n{'B, T, heads, K = V':<22}GatedDeltaNet / LinearAttention")
    for batch, length, heads, size in CASES:

        def unit(x: Any) -> Any:
            return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

        shape = (batch, length, heads, size)
        q, k = unit(random.standard_normal(shape)), unit(random.standard_normal(shape))
        v = random.standard_normal(shape).astype(np.float32)
        g, beta = -random.random(shape[:3]).astype(np.float32), random.random(shape[:3]).astype(np.float32)
        state = random.standard_normal((batch, heads, size, size)).astype(np.float32)
        flat = [x.reshape(batch, length, -1) for x in (q, k, v)]
        packed = [x.reshape(batch * length, heads, size) for x in (q, k, v)]
        gates = [x.reshape(batch * length, heads) for x in (g, beta)]
        bounds = np.arange(batch + 1, dtype=np.int32) * length
        rule = {"update_rule": "gated_delta", "scale": size**-0.5}
        linear = _session(
            "LinearAttention", [*flat, state, g, beta], {**rule, "q_num_heads": heads, "kv_num_heads": heads}, threads
        )
        # Its state is V-major.
        net = _session("GatedDeltaNet", [*packed, bounds, *gates, state.swapaxes(2, 3).copy()], rule, threads)
        o, final = linear()
        other, other_final = net()
        assert np.allclose(o.reshape(-1), other.reshape(-1), atol=1e-4)
        assert np.allclose(final, other_final.swapaxes(2, 3), atol=1e-4)
        ratio = _median(net) / _median(linear)
        print(f"{batch}, {length}, {heads}, {size:<10}{ratio:20.1f}x")


def _session(operator: str, arrays: Sequence[Any], attributes: dict[str, Any], threads: int) -> Any:
    """A call of a graph of this one operator."""
    names = [f"x{index}" for index in range(len(arrays))]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("o", "final")]
    node = helper.make_node(operator, names, ["o", "final"], domain="com.microsoft", **attributes)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], operator, inputs, outputs)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip(names, arrays, strict=True))
    return lambda: session.run(None, feeds)


def _median(call: Any, count: int = 30) -> float:
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
