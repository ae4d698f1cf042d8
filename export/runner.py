"""Running an ONNX artifact with numpy and onnxruntime alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MoMConfig
from ..sampling import check_sampling, sample
from ._onnxruntime import require_onnxruntime
from .artifact import read_manifest

LayerState = dict[str, NDArray[Any]]
State = tuple[LayerState, ...]

PREFILL_TOKENS = 4096
"""Tokens of one prefill call; longer prompts go through in pieces."""


def load(directory: str | os.PathLike[str], providers: Sequence[str] | None = None) -> OnnxRunner:
    """Open an artifact folder.

    Args:
        directory: written by ``to_onnx``.
        providers: onnxruntime execution providers; the CPU's by default.

    Raises:
        ValueError: the folder is damaged, edited or of another version.
        ImportError: onnxruntime is missing or too old.
    """
    manifest = read_manifest(directory)
    if manifest["kind"] != "onnx":
        raise ValueError(f"kind must be onnx, got {manifest['kind']!r}; this version runs ONNX artifacts")
    return OnnxRunner(Path(directory), manifest, providers or ["CPUExecutionProvider"])


class OnnxRunner:
    """``logits, state = runner(input_ids, state)``: states are values, several conversations share one runner.

    Attributes:
        config: of the model.
        manifest: of the folder.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], providers: Sequence[str]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = MoMConfig.from_dict(manifest["config"])
        self._runtime = require_onnxruntime()
        self._providers = list(providers)
        self._sessions: dict[str, Any] = {}
        self._shapes = {entry["name"]: entry["shape"] for entry in manifest["state"]}

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            options = self._runtime.SessionOptions()
            options.log_severity_level = 3
            try:
                self._sessions[name] = self._runtime.InferenceSession(
                    str(self.folder / self.manifest["graphs"][name]), options, providers=self._providers
                )
            except Exception as error:
                raise ValueError(
                    f"{self.manifest['graphs'][name]} must open in onnxruntime {self._runtime.__version__}, got "
                    f"{str(error).splitlines()[0][:300]}; it was made with {self.manifest['versions']['onnxruntime']}: "
                    "upgrade onnxruntime, or export with --to portable"
                ) from error
            self._check_session(self._sessions[name], name)
        return self._sessions[name]

    def _check_session(self, session: Any, name: str) -> None:
        """The graph takes the states that the manifest names."""
        found = {value.name: value.shape for value in session.get_inputs()}
        for layer in range(self.config.num_hidden_layers):
            for state, shape in self._shapes.items():
                key = f"past_key_values.{layer}.{state}"
                want = ["batch", shape[0] * shape[1], *shape[2:]]
                if found.get(key) != want:
                    raise ValueError(
                        f"{self.manifest['graphs'][name]} must take {key} {want} by manifest.json, got "
                        f"{found.get(key)}; the files belong to different models: export again"
                    )

    def init_state(self, batch_size: int) -> State:
        """Zeros: per layer ``recurrent_state`` ``[B, M', HV, K, V]`` and, with a convolution, ``conv_state``
        ``[B, M', C, W-1]``, float32."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}; pass the number of sequences")
        return tuple(
            {name: np.zeros((batch_size, *shape), np.float32) for name, shape in self._shapes.items()}
            for _ in range(self.config.num_hidden_layers)
        )

    def __call__(self, input_ids: Any, state: Sequence[Mapping[str, Any]] | None = None) -> tuple[Any, State]:
        """Run tokens.

        Args:
            input_ids: ``[B, T]`` integers in [0, vocab_size), T >= 1.
            state: from :meth:`init_state` or an earlier call; None for an empty one. Never modified. A state of the
                PyTorch model serves as well (its tensors are read as arrays).

        Returns:
            logits ``[B, T, vocab_size]`` float32 and the new state.

        Raises:
            ValueError: shapes, dtypes or values that do not fit.
        """
        ids = self._check_ids(input_ids)
        feeds = {"input_ids": ids, **self._feeds(ids.shape[0], state)}
        session = self._session("decode" if ids.shape[1] == 1 else "prefill")
        logits, *present = session.run(None, feeds)
        return logits, self._state(present)

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

    def _feeds(self, batch_size: int, state: Sequence[Mapping[str, Any]] | None) -> dict[str, NDArray[np.float32]]:
        if state is None:
            state = self.init_state(batch_size)
        if len(state) != self.config.num_hidden_layers:
            raise ValueError(
                f"state must have one entry for each of the {self.config.num_hidden_layers} layers, got {len(state)}; "
                "pass a state of this model"
            )
        feeds = {}
        for layer, values in enumerate(state):
            if set(values) != set(self._shapes):
                raise ValueError(
                    f"state[{layer}] must hold {', '.join(sorted(self._shapes))}, got {', '.join(sorted(values))}; "
                    "pass a state of this model"
                )
            for name, shape in self._shapes.items():
                value = np.asarray(values[name])
                if value.shape != (batch_size, *shape):
                    raise ValueError(
                        f"state[{layer}][{name!r}] must have shape {(batch_size, *shape)}, got {value.shape}; "
                        "pass a state of this model and batch size"
                    )
                if value.dtype != np.float32:
                    raise ValueError(
                        f"state[{layer}][{name!r}] must be float32, got {value.dtype}; convert it with .astype()"
                    )
                flat = (batch_size, shape[0] * shape[1], *shape[2:])
                feeds[f"past_key_values.{layer}.{name}"] = np.ascontiguousarray(value).reshape(flat)
        return feeds

    def _state(self, present: Sequence[NDArray[Any]]) -> State:
        values = iter(present)
        return tuple(
            {name: array.reshape(array.shape[0], *shape) for (name, shape), array in zip(self._shapes.items(), values)}  # noqa: B905
            for _ in range(self.config.num_hidden_layers)
        )

    def decode_loop(self, state: Sequence[Mapping[str, Any]], batch_size: int) -> Callable[[NDArray[Any]], Any]:
        """A function token ids ``[B]`` -> logits ``[B, vocab_size]`` that keeps the state in buffers of its own.

        Two sets of buffers are bound to the session and swapped at every step: nothing is allocated or copied.
        """
        session, runtime = self._session("decode"), self._runtime
        feeds = self._feeds(batch_size, state)
        sets = [
            {name: runtime.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in feeds.items()}
            for _ in range(2)
        ]
        ids = np.zeros((batch_size, 1), np.int64)
        ids_value = runtime.OrtValue.ortvalue_from_numpy(ids)
        logits = runtime.OrtValue.ortvalue_from_shape_and_type([batch_size, 1, self.config.vocab_size], np.float32)
        bindings = []
        for source, target in (sets, sets[::-1]):
            binding = session.io_binding()
            binding.bind_ortvalue_input("input_ids", ids_value)
            binding.bind_ortvalue_output("logits", logits)
            for name, value in source.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in target.items():
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
            bindings.append(binding)
        steps = 0

        def step(tokens: NDArray[Any]) -> NDArray[np.float32]:
            nonlocal steps
            ids_value.update_inplace(np.ascontiguousarray(tokens, np.int64).reshape(batch_size, 1))
            session.run_with_iobinding(bindings[steps % 2])
            steps += 1
            return logits.numpy()[:, 0]

        return step

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
        last = logits[:, -1]
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
