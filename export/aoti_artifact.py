"""Writing an AOTInductor artifact: compiled packages that run without Python, over one weights file."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._files import write_safetensors
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..mom_attention import Form
from ..state import layer_shapes
from .aoti_runner import DEVICES, describe_device, open_package, state_inputs
from .lowerings import kernels, lowerings
from .program import DYNAMIC_BATCH, DYNAMIC_LENGTH, EXAMPLE_BATCH, EXAMPLE_LENGTH, StateProgram, state_names, trace
from .torch_runner import WEIGHTS_FILE
from .writing import write_artifact

if TYPE_CHECKING:
    from ..report import Report

GRAPHS = {"prefill": "prefill.pt2", "decode": "decode.pt2"}
EXAMPLE_FILE = "aoti_generate.cpp"


def to_aoti(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-4,
    device: str = "cpu",
) -> Report:
    """Compile ahead of time with AOTInductor, for processes without Python, and verify the result.

    The folder holds ``prefill.pt2`` (any batch, two tokens or more), ``decode.pt2`` (one token), their common
    ``weights.safetensors``, ``aoti_generate.cpp``, which loads all three and generates, ``manifest.json``, a reference
    to verify against later and a tokenizer. Both packages take ``input_ids`` ``[B, T]`` int64 and the states in the
    manifest's order, shaped as :meth:`MoMForCausalLM.init_state`; they return logits ``[B, T, vocab_size]`` and the
    new states. Their weights are given to them by the process, so that both use one copy of them.

    Args:
        model: exported in float32; not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        tokenizer: a ``tokenizer.json`` to put beside the packages. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states against the PyTorch model.
        device: ``cpu``, for machines with this one's vector instructions or better, or ``cuda``, for GPUs of this
            one's compute capability.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: another device or one that is not there, a folder that holds something else, or an artifact that
            missed its tolerance (nothing is left).
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}; choose one of them")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be there to compile for it, got 'cuda' and no GPU; export where there is one")

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        placed = exact if device == "cpu" else copy.deepcopy(exact).to(device)
        constants: set[str] = set()
        io = {}
        for name, file in GRAPHS.items():
            operators = _compile(placed, name, device, folder / file)
            io[name] = {**_describe(exact.config, name), "operators": operators}
            constants.update(open_package(folder / file).get_constant_fqns())
        weights = {f"model.{name}": weight for name, weight in exact.named_parameters(remove_duplicate=False)}
        write_safetensors(folder / WEIGHTS_FILE, {name: weights[name].clone() for name in sorted(constants)})
        source = resources.files(__package__ or "").joinpath("cpp", EXAMPLE_FILE).read_text(encoding="utf-8")
        (folder / EXAMPLE_FILE).write_text(source, encoding="utf-8")
        return {
            "kind": "aoti",
            "target": "aoti",
            "graphs": GRAPHS,
            "device": describe_device(device),
            "io": io,
        }

    return write_artifact(model, directory, tokenizer, tolerance, write_files)


class CompiledProgram(StateProgram):
    """``forward(input_ids, state) -> (logits, state)``, the states a flat list in layout version 1."""

    def __init__(self, model: MoMForCausalLM, lowerings: Mapping[Any, Callable[..., Any]], form: Form) -> None:
        super().__init__(model, lowerings)
        self.form: Form = form

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[B, T]``; logits ``[B, T, vocab_size]``."""
        logits, present = self.run_form(input_ids, [tensor.flatten(1, 2) for tensor in past], None, self.form)
        if self.form != "touched":
            return logits, [present[layer][name] for layer, name in self.names]
        row = torch.arange(input_ids.shape[0], device=input_ids.device).unsqueeze(1)
        written = []
        for (layer, name), tensor in zip(self.names, past, strict=True):
            index = present[layer]["touched_index"]
            part = present[layer]["touched_" + name.removeprefix("recurrent_")]
            part = torch.unflatten(part, 1, (index.shape[1], tensor.shape[2]))
            written.append(tensor.index_put((row, index), part))
        return logits, written


def _compile(model: MoMForCausalLM, name: str, device: str, path: Path) -> dict[str, int]:
    """Write a package; its operators by count."""
    decode = name == "decode"
    with _quiet(), nullcontext() if decode else _one_chunk_is_a_size():  # compiling traces once more
        program = (export_kernels if device == "cuda" else export_decomposed)(model, decode)
        operators = Counter(_operator(node) for node in program.graph.nodes if node.op == "call_function")
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                "aot_inductor.metadata": {
                    "mom_state": state_inputs(layer_shapes(model.config, 1), state_names(model.config))
                },
                "cpp.dynamic_threads": True,  # else the exporting process's number of threads is compiled in
                **_without_line_tables(),
            },
        )
    return dict(sorted((name, count) for name, count in operators.items() if "::" in name))


def _without_line_tables() -> dict[str, bool]:
    """Smaller packages that name fewer directories of this machine, where this torch has the option."""
    known = hasattr(torch._inductor.config.aot_inductor, "enable_line_tables")
    return {"aot_inductor.enable_line_tables": False} if known else {}


def _operator(node: torch.fx.Node) -> str:
    """``namespace::name`` of an operator or, as ``triton::name``, a kernel; another name for arithmetic on sizes."""
    if "kernel_idx" in node.kwargs:
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel: Any = kernel_side_table.get_kernel(int(str(node.kwargs["kernel_idx"])))
        return f"triton::{kernel.fn.__name__}"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"higher_order::{node.target.name()}"
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def export_decomposed(model: MoMForCausalLM, decode: bool) -> torch.export.ExportedProgram:
    """The program in operators of aten alone: an operator of ours could not run without Python on a CPU."""
    program = CompiledProgram(model, lowerings("aoti", decode), "touched" if decode else "portable")
    return _export(program, decode)


def export_kernels(model: MoMForCausalLM, decode: bool) -> torch.export.ExportedProgram:
    """The program with the operators' Triton kernels in it, for CUDA."""
    with kernels() as table:
        return _export(CompiledProgram(model, table, "step" if decode else "packed"), decode)


def _export(program: CompiledProgram, decode: bool) -> torch.export.ExportedProgram:
    """Dynamic batch; one token for decode, any length for prefill."""
    model = program.model
    length, device = 1 if decode else EXAMPLE_LENGTH, model.lm_head.weight.device
    ids = torch.arange(EXAMPLE_BATCH * length, device=device).view(EXAMPLE_BATCH, length) % model.config.vocab_size
    shapes = layer_shapes(model.config, EXAMPLE_BATCH)
    past = [torch.full(shapes[name], 0.01, device=device) for _, name in program.names]
    ids_shape: dict[int, Any] = {0: DYNAMIC_BATCH} if decode else {0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH}
    return trace(program.eval(), (ids, past), (ids_shape, [{0: DYNAMIC_BATCH}] * len(past)))


def _describe(config: MoMConfig, graph: str) -> dict[str, Any]:
    """Inputs and outputs in the packages' order."""
    length: int | str = 1 if graph == "decode" else "sequence"
    states = [
        {"name": f"state.{layer}.{name}", "dtype": "float32", "shape": ["batch", *shape[1:]]}
        for layer in range(config.num_hidden_layers)
        for name, shape in layer_shapes(config, 1).items()
    ]
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", length]}
    logits = {"name": "logits", "dtype": "float32", "shape": ["batch", length, config.vocab_size]}
    return {"inputs": [ids, *states], "outputs": [logits, *states]}


@contextmanager
def _one_chunk_is_a_size() -> Iterator[None]:
    """Trace without the assumption that no size is 1, which would refuse a prompt of one chunk."""
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
