"""Writing a pt2 artifact: torch.export programs with the ``mom`` operators whole, over one weights file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._files import write_safetensors
from ..model import MoMForCausalLM
from ..mom_attention import Form
from .program import DYNAMIC_BATCH, DYNAMIC_LENGTH, EXAMPLE_BATCH, EXAMPLE_LENGTH, trace
from .pt2_runner import describe_program, operator_schemas
from .torch_runner import WEIGHTS_FILE
from .writing import write_artifact

if TYPE_CHECKING:
    from ..report import Report

GRAPHS = {"prefill": "prefill.pt2", "decode": "decode.pt2"}
FORMS: dict[str, Form] = {"prefill": "packed", "decode": "step"}
# What torch.export notes about the source code: it names files of the exporting machine.
_SOURCE_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


def to_pt2(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-4,
) -> Report:
    """Export to torch.export programs that keep the ``mom`` operators, and verify the result.

    The folder holds ``prefill.pt2`` (any batch and length), ``decode.pt2`` (one token), their common
    ``weights.safetensors``, ``manifest.json``, a reference to verify against later and a tokenizer. Both programs are
    ``(weights, input_ids, state) -> (logits, state)``: weights a dict of tensors by parameter name, input_ids
    ``[B, T]`` int64, state a tuple of dicts as :meth:`MoMForCausalLM.init_state`, logits ``[B, T, vocab_size]``.
    :func:`mom_compile.export.load` runs them; so does ``torch.export.load`` once ``mom_compile.ops`` is imported.

    Args:
        model: exported in float32; not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        tokenizer: a ``tokenizer.json`` to put beside the programs. None: bytes for a vocabulary of 257, else none.
        tolerance: largest relative error of logits and states against the PyTorch model.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: a folder that holds something else, or an artifact that missed its tolerance (nothing is left).
    """
    return write_artifact(model, directory, tokenizer, tolerance, _write_files)


def _write_files(model: MoMForCausalLM, folder: Path) -> dict[str, Any]:
    weights = _weights(model)
    write_safetensors(folder / WEIGHTS_FILE, weights)
    io: dict[str, Any] = {}
    schemas: dict[str, str] = {}
    for name, file in GRAPHS.items():
        program = export_whole(model, FORMS[name])
        torch.export.save(program, folder / file)
        io[name] = describe_program(program)
        schemas |= operator_schemas(program)
    return {
        "kind": "pt2",
        "target": "pt2",
        "graphs": GRAPHS,
        "io": io,
        "operator_schemas": dict(sorted(schemas.items())),
    }


def _weights(model: MoMForCausalLM) -> dict[str, Tensor]:
    """Parameters by name, in the order of the programs' first argument."""
    return {name: parameter.detach() for name, parameter in sorted(model.named_parameters())}


class WholeProgram(nn.Module):
    """``forward(weights, input_ids, state) -> (logits, state)`` in one form of the model, operators untouched.

    The weights are an argument: two programs of one model then share one file and one copy in memory.
    """

    def __init__(self, model: MoMForCausalLM, form: Form) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule, so its parameters are not the program's own
        self.form = form

    def forward(
        self, weights: dict[str, Tensor], input_ids: Tensor, state: tuple[dict[str, Tensor], ...]
    ) -> tuple[Tensor, tuple[dict[str, Tensor], ...]]:
        """Shapes as :meth:`MoMForCausalLM.forward`."""
        out = torch.func.functional_call(
            self._model[0], weights, (input_ids,), {"state": state, "form": self.form}, tie_weights=True
        )
        return out.logits, out.state


def export_whole(model: MoMForCausalLM, form: Form) -> torch.export.ExportedProgram:
    """The torch.export program of one form: dynamic batch; one token for ``step``, any length for ``packed``."""
    length = 1 if form == "step" else EXAMPLE_LENGTH
    device = model.lm_head.weight.device
    ids = torch.arange(EXAMPLE_BATCH * length, device=device).view(EXAMPLE_BATCH, length) % model.config.vocab_size
    state = model.init_state(EXAMPLE_BATCH)
    weights = _weights(model)
    shapes = (
        dict.fromkeys(weights),
        {0: DYNAMIC_BATCH} if form == "step" else {0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH},
        tuple({name: {0: DYNAMIC_BATCH} for name in layer} for layer in state),
    )
    program = trace(WholeProgram(model, form), (weights, ids, state), shapes)
    program.example_inputs = None  # they hold the weights once more
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for note in _SOURCE_NOTES:
                    node.meta.pop(note, None)
    return program
