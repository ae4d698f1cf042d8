"""Running a GenAI artifact: generation by onnxruntime-genai, single calls by onnxruntime on the same graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import require
from .._files import read_json
from ..sampling import check_sampling
from .onnx_runner import OnnxRunner
from .runner import State

MIN_GENAI = (0, 15)  # knows models that have a recurrent state alone
ENGINE_GENAI = (0, 18)  # its engine keeps recurrent states
ENGINE_GRAPH, ENGINE_CONFIG = "engine", "engine_config.json"
EVENTS = 64  # of the engine, taken at once


def require_genai(minimum: tuple[int, int] = MIN_GENAI) -> ModuleType:
    """onnxruntime_genai, new enough.

    Raises:
        ImportError: missing or too old.
    """
    genai = require("onnxruntime_genai", "onnx")
    if tuple(int(part) for part in genai.__version__.split(".")[:2]) < minimum:
        wanted = ".".join(map(str, minimum))
        raise ImportError(
            f"onnxruntime-genai must be at least {wanted}, got {genai.__version__}; "
            f'run: pip install --upgrade "onnxruntime-genai>={wanted}"'
        )
    return genai


class GenaiRunner(OnnxRunner):
    """A folder of ``to_genai``.

    ``runner(input_ids, state)`` runs the graph in onnxruntime; :meth:`generate` is onnxruntime-genai's own loop.

    Args:
        folder: the artifact.
        manifest: of the folder.

    Raises:
        ValueError: the folder asks for beam search.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(folder, manifest)
        _check_beams(read_json(folder / "genai_config.json")["search"].get("num_beams", 1))
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The ``onnxruntime_genai.Model``, opened at the first use."""
        if self._model is None:
            genai = require_genai()
            try:
                self._model = genai.Model(str(self.folder))
            except Exception as error:
                raise ValueError(
                    f"{self.folder} must open in onnxruntime-genai {genai.__version__}, got {str(error)[:300]}; it was "
                    f"made with {self.manifest['versions']['onnxruntime-genai']}: upgrade, or export again"
                ) from error
        return self._model

    def generator(self, batch_size: int, max_length: int, **search: Any) -> Any:
        """An ``onnxruntime_genai.Generator`` without tokens, for what :meth:`generate` has no argument for.

        Args:
            batch_size: rows.
            max_length: tokens of the prompt and the continuation together.
            search: GenAI's search options.

        Raises:
            ValueError: num_beams above 1.
        """
        genai = require_genai()
        _check_beams(search.get("num_beams", 1))
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=max_length, batch_size=batch_size, **search)
        return genai.Generator(self.model, params)

    def generate(  # type: ignore[override]
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | None = None,
        num_beams: int = 1,
    ) -> Iterator[NDArray[np.int64]]:
        """Continue the rows of ``input_ids`` ``[B, T]``; yields the ``[B]`` ids of each step.

        Args:
            input_ids: the prompts, padded on the right where they differ in length.
            max_new_tokens: at most this many steps.
            attention_mask: ``[B, T]``, 0 for padding on the right; None: no padding.
            temperature, top_p, seed: sampling; temperature 0 is greedy.
            eos_token_id: stops when every row drew it; a row that did is filled with it. None: the config's. GenAI
                itself always stops there: another id, or -1 for never, must not be asked for where it could matter.
            num_beams: must be 1.

        Raises:
            ValueError: also for beam search, which GenAI runs without reordering these states, and for prompts in a
                padded batch that hold the pad token, which GenAI would take for padding.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        _check_beams(num_beams)
        ids = self._check_ids(input_ids)
        settings = read_json(self.folder / "genai_config.json")["model"]
        pad, eos = settings["pad_token_id"], settings["eos_token_id"]
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
        if mask.shape != ids.shape or not mask[:, 0].all() or (np.diff(mask, axis=1) > 0).any():
            raise ValueError(
                f"attention_mask must be [B, T] = {ids.shape} with padding on the right alone, got shape {mask.shape}; "
                "move the padding to the end of each row"
            )
        if len(ids) > 1 and ((ids == pad) & (mask == 1)).any():
            raise ValueError(
                f"input_ids must not hold the pad token {pad} in a batch of {len(ids)}, got it outside the padding: "
                "GenAI would skip it; run such a prompt alone"
            )
        if eos_token_id not in (None, eos):
            raise ValueError(
                f"eos_token_id must be {eos} as in genai_config.json, got {eos_token_id}; GenAI stops at its own"
            )
        search: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            search |= {"temperature": temperature, "top_p": top_p}
            if seed is not None:
                search["random_seed"] = seed
        ids = np.where(mask == 1, ids, pad)
        return self._tokens(self.generator(len(ids), ids.shape[1] + max_new_tokens, **search), ids, max_new_tokens, eos)

    def _tokens(
        self, generator: Any, ids: NDArray[np.int64], max_new_tokens: int, eos: int
    ) -> Iterator[NDArray[np.int64]]:
        if max_new_tokens == 0:
            return
        generator.append_tokens(ids.astype(np.int32) if len(ids) > 1 else ids[0].astype(np.int32))
        done = np.zeros(len(ids), bool)
        while not generator.is_done():
            generator.generate_next_token()
            token = np.where(done, eos, np.asarray(generator.get_next_tokens(), np.int64))
            done |= token == eos
            yield token

    @property
    def has_engine(self) -> bool:
        """Whether the artifact has the form for GenAI's engine."""
        return ENGINE_GRAPH in self.manifest["graphs"]

    def engine(self) -> Any:
        """A new ``onnxruntime_genai.Engine``, which batches requests as they come and go.

        Raises:
            ValueError: the artifact has no form for it.
            ImportError: onnxruntime-genai is missing or too old.
        """
        if not self.has_engine:
            raise ValueError(f"{self.folder} must hold the form for the engine, got none; export with --engine")
        genai = require_genai(ENGINE_GENAI)
        config = genai.Config(str(self.folder))
        config.overlay((self.folder / ENGINE_CONFIG).read_text(encoding="utf-8"))
        return genai.Engine(genai.Model(config))

    def generate_requests(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts of any lengths, by GenAI's engine.

        Args:
            prompts: token ids of each request.
            max_new_tokens: at most this many for each.

        Returns:
            The new tokens of each request, the end-of-text token included where it was drawn.

        Raises:
            ValueError: no engine, ids that do not fit, or a request that the engine gave up.
        """
        engine, genai = self.engine(), require_genai(ENGINE_GENAI)
        flags = genai.EngineEventFlags
        ids = [self._check_ids([list(prompt)])[0] for prompt in prompts]
        texts: list[list[int]] = [[] for _ in ids]
        if max_new_tokens == 0:
            return texts
        requests = [engine.create_request() for _ in ids]
        for request, prompt in zip(requests, ids, strict=True):
            options = genai.TurnOptions(request)
            options.set_max_generated_tokens(max_new_tokens)
            options.set_do_sample(False)
            request.begin_turn(prompt.astype(np.int32), options)
        buffer = engine.create_event_buffer(EVENTS)
        eos = read_json(self.folder / "genai_config.json")["model"]["eos_token_id"]
        while engine.has_pending_requests():
            for event in engine.run(buffer):
                if event.flags & flags.FAILED:
                    raise ValueError(f"prompts must be what the engine can run, got its error {event.error_code}")
                text = texts[requests.index(event.request)] if event.request in requests else []
                if event.flags & flags.TOKEN:
                    text.append(int(event.token))
                if event.flags & flags.TURN_FINISHED:
                    if event.finish_reason == genai.FinishReason.EOS and text[-1:] != [eos]:
                        text.append(eos)
                    event.request.close()  # its place in the batch becomes free
        return texts

    def run_masked(self, input_ids: Any, attention_mask: Any, state: Any = None) -> tuple[Any, State]:
        """As calling the runner, with padding.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding on the left or the right; one run of ones per row. Padding
                changes no state, and its logits mean nothing.
            state: as there.

        Raises:
            ValueError: shapes, dtypes or values that do not fit.
        """
        ids = self._check_ids(input_ids)
        mask = np.asarray(attention_mask).astype(np.int64)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {ids.shape}, got {mask.shape}; "
                "pass one value per token"
            )
        return self._run(ids, self._check_state(len(ids), state), attention_mask=mask)

    def _graph_name(self, length: int) -> str:
        return "model"

    def _inputs(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if "conv_state" not in self._shapes:  # the dummies by which GenAI finds the layers
            for layer in range(self.config.num_hidden_layers):
                inputs[f"past_key_values.{layer}.conv_state"] = np.zeros((len(ids), 1, 1), np.float32)
        return inputs


def _check_beams(num_beams: int) -> None:
    if num_beams != 1:
        raise ValueError(
            f"num_beams must be 1, got {num_beams}; GenAI's beam search does not reorder recurrent states and would "
            "be wrong without a word: sample, or take the greedy text"
        )
