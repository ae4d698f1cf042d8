"""Opening an artifact, and what its runners share: checks, the state, sampling. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MoMConfig
from ..sampling import check_sampling, sample
from .artifact import read_manifest
from .stored_state import array_dtype

LayerState = dict[str, Any]
State = tuple[LayerState, ...]
Step = Callable[[NDArray[Any]], NDArray[np.float32]]

PREFILL_TOKENS = 4096
"""Tokens of one prefill call; longer prompts go through in pieces."""
STORED = ("float32", "float16", "bfloat16")
"""Dtypes of a state that a runner converts to its own; 16 bits are rounded to."""
KINDS = ("onnx", "pt2", "genai", "aoti", "tensorrt")


def load(directory: str | os.PathLike[str], **options: Any) -> Runner:
    """Open an artifact folder.

    Args:
        directory: written by one of the ``to_*`` functions.
        options: of the runner: ``providers`` (onnxruntime execution providers, the CPU's by default), ``prepack`` and
            ``fused`` (see :class:`mom_compile.export.OnnxRunner`) for an ONNX artifact, ``device`` (the CPU by
            default) for a pt2 artifact, ``device`` (what it was compiled for by default) for an aoti artifact. A
            tensorrt artifact runs its engines on a GPU, or with ``providers`` the same graphs in onnxruntime.

    Raises:
        ValueError: the folder is damaged, edited or of another version.
        ImportError: a package that runs it is missing or too old.
    """
    manifest = read_manifest(directory)
    folder, kind = Path(directory), manifest["kind"]
    if kind == "onnx":
        from .onnx_runner import OnnxRunner

        return OnnxRunner(folder, manifest, **options)
    if kind == "pt2":
        from .pt2_runner import Pt2Runner

        return Pt2Runner(folder, manifest, **options)
    if kind == "genai":
        from .genai_runner import GenaiRunner

        return GenaiRunner(folder, manifest, **options)
    if kind == "kernels":
        raise ValueError("kind must be that of a graph, got 'kernels'; a kernel pack is launched with its mom_launch.h")
    if kind == "aoti":
        from .aoti_runner import AotiRunner

        return AotiRunner(folder, manifest, **options)
    if kind == "tensorrt":
        from .tensorrt_runner import open_tensorrt

        return open_tensorrt(folder, manifest, **options)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}; a newer mom-compile wrote the folder")


class Runner:
    """``logits, state = runner(input_ids, state)``: states are values, several conversations share one runner.

    Attributes:
        config: of the model.
        manifest: of the folder.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = MoMConfig.from_dict(manifest["config"])
        self._shapes: dict[str, list[int]] = {entry["name"]: entry["shape"] for entry in manifest["state"]}
        self._dtypes: dict[str, str] = {entry["name"]: entry.get("dtype", "float32") for entry in manifest["state"]}

    def init_state(self, batch_size: int) -> State:
        """Zeros: per layer ``recurrent_state`` ``[B, M', HV, K, V]`` and, with a convolution, ``conv_state``
        ``[B, M', C, W-1]``, in the manifest's dtypes."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}; pass the number of sequences")
        return tuple(
            {name: self._zeros((batch_size, *shape), self._dtypes[name]) for name, shape in self._shapes.items()}
            for _ in range(self.config.num_hidden_layers)
        )

    def __call__(self, input_ids: Any, state: Sequence[Mapping[str, Any]] | None = None) -> tuple[Any, State]:
        """Run tokens.

        Args:
            input_ids: ``[B, T]`` integers in [0, vocab_size), T >= 1.
            state: from :meth:`init_state` or an earlier call, of this runner, another one or the PyTorch model; None
                for an empty one. Never modified; float32, float16 and bfloat16 are converted to the manifest's dtype.

        Returns:
            logits ``[B, T, vocab_size]`` float32 and the new state in the manifest's dtypes: arrays, or tensors from a
            pt2 artifact.

        Raises:
            ValueError: shapes, dtypes or values that do not fit.
        """
        ids = self._check_ids(input_ids)
        return self._run(ids, self._check_state(ids.shape[0], state))

    def decode_loop(self, state: Sequence[Mapping[str, Any]], batch_size: int, **options: Any) -> Step:
        """A function token ids ``[B]`` -> logits ``[B, vocab_size]`` (arrays) that carries the state on by itself."""
        raise NotImplementedError

    def decode_ways(self) -> dict[str, dict[str, Any]]:
        """The ways in which :meth:`decode_loop` can keep its state: description -> options. All are verified."""
        return {"": {}}

    def close(self) -> None:
        """Give back what is open; the next call opens it again. Loops that were made before go on."""

    def prefill_ways(self) -> dict[str, Runner]:
        """Runners of this artifact that call other graphs than this one: description -> runner. All are verified."""
        return {"": self}

    def check_structure(self) -> None:
        """Raise ValueError unless the files have the names, shapes and operators of the contract."""
        raise NotImplementedError

    def why_not(self) -> str | None:
        """What is missing on this machine to run the artifact; None: nothing that is known without running it."""
        return None

    def not_run(self) -> dict[str, str]:
        """Of an artifact that runs, the parts that this machine cannot run: description -> what is missing."""
        return {}

    def _run(self, ids: NDArray[np.int64], state: State) -> tuple[Any, State]:
        raise NotImplementedError

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.zeros(shape, array_dtype(dtype))

    def _value(self, value: Any) -> Any:
        """A state entry as this runner's own kind of array."""
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # which numpy cannot read
            value = value.float()
        return np.asarray(value)

    def _convert(self, value: Any, dtype: str) -> Any:
        """A state entry of this runner's kind in another dtype."""
        return value.astype(array_dtype(dtype))

    def _check_ids(self, input_ids: Any) -> NDArray[np.int64]:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
            raise ValueError(
                f"input_ids must be [B, T] integers with at least one token, got shape {ids.shape} of {ids.dtype}; "
                "pass token ids, with a batch axis"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(
                f"input_ids must lie in [0, vocab_size = {self.config.vocab_size}), got {bad}; "
                "the text was tokenized for another model"
            )
        return np.ascontiguousarray(ids, np.int64)

    def _check_state(self, batch_size: int, state: Sequence[Mapping[str, Any]] | None) -> State:
        """The state in this runner's kind of array, empty for None."""
        if state is None:
            return self.init_state(batch_size)
        if len(state) != self.config.num_hidden_layers:
            raise ValueError(
                f"state must have one entry for each of the {self.config.num_hidden_layers} layers, got {len(state)}; "
                "pass a state of this model"
            )
        checked = []
        for layer, values in enumerate(state):
            if set(values) != set(self._shapes):
                raise ValueError(
                    f"state[{layer}] must hold {', '.join(sorted(self._shapes))}, got {', '.join(sorted(values))}; "
                    "pass a state of this model"
                )
            checked.append({name: self._value(values[name]) for name in self._shapes})
            for name, value in checked[-1].items():
                shape = (batch_size, *self._shapes[name])
                if tuple(value.shape) != shape:
                    raise ValueError(
                        f"state[{layer}][{name!r}] must have shape {shape}, got {tuple(value.shape)}; "
                        "pass a state of this model and batch size"
                    )
                dtype = str(value.dtype).removeprefix("torch.")
                if dtype not in STORED:
                    raise ValueError(
                        f"state[{layer}][{name!r}] must be one of {', '.join(STORED)}, got {dtype}; convert it first"
                    )
                if dtype != self._dtypes[name]:
                    checked[-1][name] = self._convert(value, self._dtypes[name])
        return tuple(checked)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """Continue the rows of ``input_ids`` ``[B, T]``, all of one length; yields the ``[B]`` ids of each step.

        Args:
            input_ids: the prompt.
            max_new_tokens: at most this many steps.
            temperature, top_p, seed: sampling; temperature 0 is greedy.
            eos_token_id: stops when every row drew it; a row that did is filled with it. None: the config's, -1: never.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        ids = self._check_ids(input_ids)
        if eos_token_id is None:
            eos_token_id = -1 if self.config.eos_token_id is None else self.config.eos_token_id
        generator = np.random.default_rng(seed)
        return self._generate(ids, max_new_tokens, temperature, top_p, generator, eos_token_id)

    def _generate(
        self,
        ids: NDArray[np.int64],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        generator: np.random.Generator,
        eos: int,
    ) -> Iterator[NDArray[np.int64]]:
        state: State | None = None
        for start in range(0, ids.shape[1], PREFILL_TOKENS):
            logits, state = self(ids[:, start : start + PREFILL_TOKENS], state)
        assert state is not None
        last = np.asarray(logits[:, -1])
        step = self.decode_loop(state, ids.shape[0])
        done = np.zeros(ids.shape[0], bool)
        for index in range(max_new_tokens):
            token = sample(last, temperature, top_p, generator)
            if eos >= 0:
                token = np.where(done, eos, token)
                done |= token == eos
            yield token
            if index + 1 == max_new_tokens or done.all():
                return
            last = step(token)
