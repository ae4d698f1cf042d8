"""A graph of a kernel pack's functions run without ONNX Runtime: its nodes launch the same kernels through Triton."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from mom_compile import MoMConfig
from mom_compile.export.kernel_function import Dtypes
from mom_compile.export.kernel_functions import functions
from mom_compile.export.kernel_table import record
from mom_compile.export.structure import OWN_DOMAIN
from mom_compile.ops._layout import CHUNK, rows_bound


class Evaluator:
    """``outputs by name = evaluator(inputs by name)``, the nodes as ``cpp/mom_onnx.cpp`` runs them."""

    def __init__(self, path: Path, config: MoMConfig, dtypes: Dtypes, architecture: int) -> None:
        self.config, self.architecture = config, architecture
        self.functions = {function.name: function for function in functions(config, dtypes)}

        class Kernels(OpRun):
            op_domain = OWN_DOMAIN

            def _run(node, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
                return self.node(inputs, attributes)

        class KernelsInPlace(Kernels):
            pass

        self._evaluator = ReferenceEvaluator(str(path), new_ops=[Kernels, KernelsInPlace])

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        values = self._evaluator.run(None, inputs)
        return dict(zip(self._evaluator.output_names, values, strict=True))

    def node(self, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> tuple[Any, ...]:
        """The outputs of one node."""
        ids, *given = inputs
        config, tokens, sequences = self.config, ids.size, ids.shape[0]
        rows = rows_bound(tokens, config.topk, sequences, config.num_memories, config.shared_mem)
        sizes = {"batch": sequences, "sequences": sequences, "tokens": tokens, "chunks": rows // CHUNK}
        sizes["rows"] = tokens * attributes["rows"]
        function = self.functions[attributes["function"]]
        first, *others = (*(sizes[unit] for unit in function.units), 0, 0)[:3]
        numbers = dict(zip(attributes["numbers"].split(), attributes["values"], strict=False))
        memory: dict[str, Tensor] = {}  # bytes
        for name, value, offset in zip(attributes["inputs"].split(), given, attributes["offsets"], strict=True):
            memory[name] = torch.from_numpy(np.ascontiguousarray(value).copy()).flatten().view(torch.uint8)[offset:]
        types: dict[str, torch.dtype] = {}
        for begin in range(0, first, function.limit):  # larger sizes go in pieces
            size = min(function.limit, first - begin)
            for call in record(function, self.architecture, (size, *others)):  # type: ignore[arg-type]
                arguments = []
                for name, value in zip(call.kernel.arg_names, call.args, strict=False):
                    if not isinstance(value, Tensor):
                        arguments.append(numbers.get(name, value))
                        continue
                    types[name] = value.dtype
                    grows = value.dim() > 0 and value.shape[0] == size and first != size
                    row = math.prod(value.shape[1:]) * value.itemsize
                    if name not in memory:
                        count = first if grows else value.numel() * value.itemsize // row if row else 0
                        memory[name] = torch.zeros(max(count * row, value.itemsize), dtype=torch.uint8)
                    arguments.append(memory[name][begin * row if grows else 0 :].view(value.dtype))
                call._replace(args=tuple(arguments)).run()
        results = []
        for name, columns, like in zip(
            attributes["outputs"].split(), attributes["columns"], attributes["like"], strict=True
        ):
            if name not in memory:  # of kernels for other sizes
                results.append(np.zeros(0, np.float32))
                continue
            array = memory[name].view(types[name]).numpy()
            shape = given[like].shape if like >= 0 else (-1, columns) if columns else (-1,)
            results.append(array.reshape(shape))
        return tuple(results)
