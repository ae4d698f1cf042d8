"""Running a pt2 artifact with torch and the ``mom`` operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import ops as ops  # registers the operators that the programs call
from .._files import read_safetensors
from .runner import State
from .torch_runner import WEIGHTS_FILE, TorchRunner


class Pt2Runner(TorchRunner):
    """A folder of ``to_pt2``; logits and states are tensors.

    Args:
        folder: the artifact.
        manifest: of the folder.
        device: where the weights and the state lie.

    Raises:
        ValueError: the operators of this installation have other schemas than those of the programs.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str | torch.device = "cpu") -> None:
        super().__init__(folder, manifest, device)
        check_schemas(manifest["operator_schemas"], manifest["versions"]["mom-compile"])
        weights = read_safetensors(folder / WEIGHTS_FILE)
        self._weights = {name: weights[name].to(self.device) for name in sorted(weights)}  # the programs' order
        self._programs: dict[str, Any] = {}

    def check_structure(self) -> None:
        """As :meth:`Runner.check_structure`: the programs take and return what the manifest says."""
        for name, file in self.manifest["graphs"].items():
            found, expected = describe_program(self._open(name)), self.manifest["io"][name]
            for part in expected:
                if found.get(part) != expected[part]:
                    raise ValueError(
                        f"{file} must have the {part} in manifest.json, got {found.get(part)}; export again"
                    )
            foreign = [operator for operator in found["operators"] if operator.split("::")[0] not in ("aten", "mom")]
            if foreign:
                raise ValueError(f"{file} must hold operators of aten and mom alone, got {', '.join(foreign)}")

    def _open(self, name: str) -> torch.export.ExportedProgram:
        file = self.manifest["graphs"][name]
        try:
            return torch.export.load(self.folder / file)
        except Exception as error:
            raise ValueError(
                f"{file} must open in torch {torch.__version__}, got {str(error).splitlines()[0][:300]}; "
                f"it was made with {self.manifest['versions']['torch']}: upgrade torch, or export again"
            ) from error

    def _program(self, name: str) -> Any:
        if name not in self._programs:
            program = self._open(name)
            if self.device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, self.device)
            self._programs[name] = program.module()
        return self._programs[name]

    @torch.no_grad()
    def _run(self, ids: NDArray[np.int64], state: State) -> tuple[torch.Tensor, State]:
        program = self._program("decode" if ids.shape[1] == 1 else "prefill")
        logits, present = program(self._weights, torch.from_numpy(ids).to(self.device), state)
        return logits, present


def check_schemas(recorded: Mapping[str, str], version: str) -> None:
    """Raise unless every operator means what it meant when the programs were exported.

    Arguments appended with a default are fine; a changed default would load and silently give other numbers.
    """
    for name, schema in recorded.items():
        operator = getattr(torch.ops.mom, name.removeprefix("mom::"), None)
        if operator is None:
            raise ValueError(
                f"operator {name} must be registered, got none; the programs were made with mom-compile {version}: "
                "install that version, or export again"
            )
        current = operator.default._schema
        if str(current) != schema and not current.is_backward_compatible_with(torch._C.parse_schema(schema)):
            raise ValueError(
                f"operator {name} must have the schema {schema}, got {current}; the programs were made with "
                f"mom-compile {version}: install that version, or export again"
            )


def operator_schemas(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Name -> schema of the ``mom`` operators in a program."""
    return {
        node.target._schema.name: str(node.target._schema)
        for node in program.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", None) == "mom"
    }


def describe_program(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Inputs and outputs (name, dtype, shape) without the weights, and operators by count."""
    signature = program.graph_signature
    weights = [name for name in signature.user_inputs if str(name).startswith("weights_")]
    if list(signature.user_inputs[: len(weights)]) != weights or signature.buffers or signature.parameters:
        raise ValueError(f"inputs must start with the weights and nothing be hidden, got {signature}; export again")
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    symbols: dict[str, str] = {}
    ids = values[str(signature.user_inputs[len(weights)])]
    for axis, size in zip(("batch", "sequence"), ids.shape, strict=True):
        symbols.setdefault(str(size), axis)
    keys = _state_keys(program)

    def describe(name: str, value: torch.Tensor) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else symbols.get(str(size), str(size)) for size in value.shape]
        return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}

    past, (logits, *present) = signature.user_inputs[len(weights) + 1 :], signature.user_outputs
    operators = Counter(
        node.target._schema.name
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    )
    return {
        "inputs": [
            describe("input_ids", ids),
            *(describe(f"state.{key}", values[str(name)]) for key, name in zip(keys, past, strict=True)),
        ],
        "outputs": [
            describe("logits", values[str(logits)]),
            *(describe(f"state.{key}", values[str(name)]) for key, name in zip(keys, present, strict=True)),
        ],
        "operators": dict(sorted(operators.items())),
    }


def _state_keys(program: torch.export.ExportedProgram) -> list[str]:
    """``{layer}.{name}`` of the state tensors, from the structure of the arguments."""
    arguments = torch.utils._pytree.tree_unflatten(
        [None] * program.call_spec.in_spec.num_leaves, program.call_spec.in_spec
    )
    state = arguments[0][2]
    return [f"{layer}.{name}" for layer, values in enumerate(state) for name in values]
