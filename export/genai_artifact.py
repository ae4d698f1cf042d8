"""Writing an ONNX Runtime GenAI folder: one graph with an attention mask, and the configuration around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._files import write_json
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..tokenizer import BYTE_VOCAB_SIZE, TOKENIZER_FILE
from .lowerings import lowerings
from .onnx_artifact import check_onnx_packages, convert, quiet, save_graphs
from .program import (
    DYNAMIC_BATCH,
    DYNAMIC_LENGTH,
    EXAMPLE_BATCH,
    EXAMPLE_LENGTH,
    StateProgram,
    example_inputs,
    state_names,
    trace,
)
from .stored_state import check_state_dtype
from .writing import package_versions, write_artifact

if TYPE_CHECKING:
    from ..report import Report

GRAPH = "model.onnx"
CONFIG_FILE = "genai_config.json"
CONTEXT_LENGTH = 1 << 20  # the state has one size: nothing in the graph bounds the length
STATE_DTYPES = ("float32", "float16")
# A tokenizer class that GenAI reads as byte-level BPE with the vocabulary of tokenizer.json.
TOKENIZER_CLASS = "Qwen2Tokenizer"


def to_genai(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    tolerance: float = 1e-4,
    state_dtype: str = "float32",
    engine: bool = False,
) -> Report:
    """Export a folder that ``onnxruntime_genai.Model`` opens, and verify the result.

    The folder holds ``model.onnx`` and its ``weights.bin``, ``genai_config.json``, ``manifest.json``, a reference to
    verify against later and a tokenizer. The graph takes ``input_ids`` ``[B, T]`` and ``attention_mask`` ``[B, S]``
    int64, of which the last T columns count (0 for padding on either side, one run of ones per row), and
    ``past_key_values.{i}.*``; it gives ``logits`` ``[B, T, vocab_size]`` and ``present.{i}.*``, the states at the end
    of each row's own text. It is right when past and present share one buffer.

    With ``engine`` there are ``engine.onnx``, over the same weights, and ``engine_config.json``, which
    ``onnxruntime_genai.Config.overlay`` lays over the configuration: a model for ``onnxruntime_genai.Engine``, which
    batches requests as they come and go.

    Args:
        model: exported in float32; not changed.
        directory: a new folder, or an artifact to replace. It appears only when the verification has passed.
        tokenizer: a byte-level BPE ``tokenizer.json``, for GenAI's own text functions. None: token ids only.
        tolerance: largest relative error of logits and states against the PyTorch model.
        state_dtype: of the recurrent states, ``float32`` or ``float16``; the arithmetic is float32.
        engine: also write the form for the engine.

    Returns:
        What was compared, with the errors; see :class:`mom_compile.report.Report`.

    Raises:
        ValueError: another state_dtype, a folder that holds something else, or an artifact that missed its tolerance
            (nothing is left).
        ImportError: onnx, onnxscript, onnxruntime or onnxruntime-genai is missing.
    """
    from .genai_runner import ENGINE_CONFIG, ENGINE_GENAI, ENGINE_GRAPH, MIN_GENAI, require_genai

    check_state_dtype(state_dtype, STATE_DTYPES)
    runtime = check_onnx_packages()
    genai = require_genai(ENGINE_GENAI if engine else MIN_GENAI)

    def write_files(exact: MoMForCausalLM, folder: Path) -> dict[str, Any]:
        graphs: list[tuple[str, str, Callable[[], Any]]] = [("model", GRAPH, lambda: _graph(exact, state_dtype))]
        write_json(folder / CONFIG_FILE, genai_config(exact.config))
        if tokenizer is None and exact.config.vocab_size == BYTE_VOCAB_SIZE:
            write_json(folder / TOKENIZER_FILE, byte_tokenizer_json())
        if (folder / TOKENIZER_FILE).is_file():
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": TOKENIZER_CLASS})
        if engine:
            from .genai_engine import ENGINE_FILE, engine_config, engine_graph

            graphs.append((ENGINE_GRAPH, ENGINE_FILE, lambda: engine_graph(exact, state_dtype)))
            write_json(folder / ENGINE_CONFIG, engine_config(exact.config))
        io = save_graphs(folder, graphs)
        return {
            "kind": "genai",
            "target": "onnxruntime",
            "state_dtype": state_dtype,
            "graphs": {name: file for name, file, _ in graphs},
            "io": io,
            "versions": {
                **package_versions("onnx", "onnxscript"),
                "onnxruntime": runtime.__version__,
                "onnxruntime-genai": genai.__version__,
            },
        }

    return write_artifact(model, directory, tokenizer, tolerance, write_files)


def genai_config(config: MoMConfig) -> dict[str, Any]:
    """The contents of genai_config.json."""
    eos = 0 if config.eos_token_id is None else config.eos_token_id
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": CONTEXT_LENGTH,
            "bos_token_id": eos if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": eos if config.pad_token_id is None else config.pad_token_id,
            "decoder": {
                "filename": GRAPH,
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "session_options": {},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 4096, "do_sample": False, "num_beams": 1, "past_present_share_buffer": False},
    }


def byte_tokenizer_json() -> dict[str, Any]:
    """The byte vocabulary (bytes 0 to 255, then end-of-text) as a byte-level BPE without merges."""
    # Byte-level BPE writes a byte that is no printable Latin-1 character as one from U+0100 upwards, in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", **end}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


class GenaiProgram(StateProgram):
    """``forward(input_ids, attention_mask, past) -> (logits, present)``; one ``conv_state`` per layer, always.

    GenAI finds the layers by their ``conv_state``: a layer without a convolution hands a dummy ``[B, 1, 1]`` through.
    """

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids ``[B, T]``, attention_mask ``[B, S]``, S >= T."""
        length, total = input_ids.shape[1], attention_mask.shape[1]
        # index_select, not a slice: a slice asks for a proof that S >= T.
        columns = torch.arange(length, device=input_ids.device) + (total - length)
        valid = attention_mask.index_select(1, columns) != 0
        logits, present = self.run(input_ids, self.states(past), valid)
        return logits, self.with_dummies(past, present)

    def states(self, past: list[Tensor]) -> list[Tensor]:
        """Without the dummies."""
        return past if self.model.config.use_short_conv else past[1::2]

    def with_dummies(self, past: list[Tensor], present: list[Tensor]) -> list[Tensor]:
        """The new states as the graph gives them."""
        if self.model.config.use_short_conv:
            return present
        return [x for dummy, state in zip(past[::2], present, strict=True) for x in (dummy.clone(), state)]


def genai_state_names(config: MoMConfig) -> list[tuple[int, str]]:
    """(layer, name) of every state tensor in graph order, dummies included."""
    if config.use_short_conv:
        return state_names(config)
    return [(layer, name) for layer in range(config.num_hidden_layers) for name in ("conv_state", "recurrent_state")]


def genai_inputs(model: MoMForCausalLM, state_dtype: str) -> tuple[Tensor, list[Tensor]]:
    """Tokens and a non-zero state, dummies included."""
    ids, past = example_inputs(model, EXAMPLE_BATCH, EXAMPLE_LENGTH, state_dtype)
    if not model.config.use_short_conv:
        past = [x for state in past for x in (torch.zeros(EXAMPLE_BATCH, 1, 1), state)]
    return ids, past


def _graph(model: MoMForCausalLM, state_dtype: str) -> Any:
    ids, past = genai_inputs(model, state_dtype)
    mask = torch.ones(EXAMPLE_BATCH, EXAMPLE_LENGTH + 5, dtype=torch.int64)
    total = torch.export.Dim("total", min=1, max=1 << 21)
    shapes = ({0: DYNAMIC_BATCH, 1: DYNAMIC_LENGTH}, {0: DYNAMIC_BATCH, 1: total}, [{0: DYNAMIC_BATCH}] * len(past))
    with quiet():
        program = GenaiProgram(model, lowerings("onnxruntime", False), state_dtype=state_dtype)
        traced = trace(program, (ids, mask, past), shapes)
    names = [f"{layer}.{name}" for layer, name in genai_state_names(model.config)]
    inputs: dict[str, str | None] = {"input_ids": "sequence", "attention_mask": "total_sequence"}
    inputs |= dict.fromkeys(f"past_key_values.{name}" for name in names)
    outputs: dict[str, str | None] = {"logits": "sequence", **dict.fromkeys(f"present.{name}" for name in names)}
    return convert(traced, inputs, outputs)
