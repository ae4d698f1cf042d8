"""Running an ONNX artifact with numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._onnxruntime import CUDA_PROVIDER, exact_providers, fit_linear_attention, require_onnxruntime
from .operator_library import CPU_OPERATORS, CUDA_OPERATORS
from .runner import Runner, State, Step
from .stored_state import array_dtype, ort_value
from .weights_file import WEIGHTS_FILE

TOUCHED_GRAPH = "decode_touched"
CUDA_GRAPH = "decode_cuda"
TRANSPOSED_STATE = "transposed_state"
"""The recurrent state of CUDA_GRAPH, ``[B, M'*HV, V, K]``."""
FUSED_GRAPHS = {"prefill": "prefill_cpu", "decode": "decode_cpu"}
"""The same by operators of ours for the CPU; of a token a node is a whole layer."""
FORCED_GRAPH = "prefill_forced"
KERNELS_FOLDER = "kernels"
"""Of an artifact whose nodes are kernels of ours."""
_DTYPES = {  # onnxruntime's name of a type -> ours
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}


class OnnxRunner(Runner):
    """A folder of ``to_onnx``; states are arrays of numpy.

    Args:
        folder: the artifact.
        manifest: of the folder.
        providers: onnxruntime execution providers; None: the CPU's, or for a folder of ``to_onnx_cuda``, which has no
            other, CUDA's with ``enable_cuda_graph``, by which each :meth:`decode_loop` is a CUDA graph. CUDA's computes
            float32 products in float32 unless its options have ``use_tf32``: the router chooses by them.
        prepack: float32 weights laid out anew for the products of the CPU: small ones decode faster, and each session
            holds a copy of its own. False: all sessions map the one file.
        threads: of a session on the CPU; None: onnxruntime's own choice.
        fused: by the graphs with operators of ours for the CPU; None: where the artifact has them and their library.

    Raises:
        ValueError: a bfloat16 state on another provider than the CPU's.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        providers: Sequence[str] | None = None,
        prepack: bool = False,
        threads: int | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(folder, manifest)
        self._prepack = prepack
        self._threads = threads
        self._runtime = require_onnxruntime()
        self._kernels = folder / KERNELS_FOLDER if (folder / KERNELS_FOLDER).is_dir() else None
        default = "CPUExecutionProvider" if self._kernels is None else (CUDA_PROVIDER, {"enable_cuda_graph": "1"})
        self._providers = exact_providers(providers or [default])
        self._captures = self._providers != _uncaptured(self._providers)
        self._on_gpu = self._providers != ["CPUExecutionProvider"]
        self._device = "cuda" if CUDA_PROVIDER in str(self._providers) else "cpu"
        if self._kernels is not None and self._device != "cuda":
            raise ValueError(
                f"providers must have {CUDA_PROVIDER} for this artifact, got {providers}; its nodes are kernels"
            )
        if self._device == "cuda" and self._kernels is None:
            fit_linear_attention(self.config.head_dim, self.config.value_dim)
        self._has_fused = set(FUSED_GRAPHS.values()) <= manifest["graphs"].keys() and not self._on_gpu
        if fused:
            self._check_fused()
        self._fused = not self.not_run() and self._has_fused if fused is None else fused
        self._sessions: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        if self._on_gpu and "bfloat16" in self._dtypes.values():
            raise ValueError(
                f"providers must be the CPU's for a bfloat16 state, got {self._providers}; onnxruntime puts no numpy "
                "array of it on a device: export with state_dtype float16"
            )

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            self._sessions[name] = self._open(name, _uncaptured(self._providers))
        return self._sessions[name]

    def _open(self, name: str, providers: Sequence[Any]) -> Any:
        """A new session of a graph, checked."""
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self.manifest.get("precision", "float32") == "float32" and not self._on_gpu and not self._prepack:
            # Products of 8 and 4 bits need it.
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = self._create_session(name, options, providers)
        except (ImportError, ValueError):  # ours; those of onnxruntime are neither
            raise
        except Exception as error:
            raise ValueError(
                f"{self.manifest['graphs'][name]} must open in onnxruntime {self._runtime.__version__}, got "
                f"{str(error).splitlines()[0][:300]}; it was made with {self.manifest['versions']['onnxruntime']}: "
                "upgrade onnxruntime, or export with --to portable"
            ) from error
        self._check_session(session, name)
        return session

    def why_not(self) -> str | None:
        """As :meth:`Runner.why_not`."""
        if self._kernels is None:
            return None
        if CUDA_PROVIDER not in self._runtime.get_available_providers():
            return (
                f"onnxruntime must have {CUDA_PROVIDER}, got none; install onnxruntime-gpu in the place of onnxruntime"
            )
        return CUDA_OPERATORS.missing(self._kernels)

    def _create_session(self, name: str, options: Any, providers: Sequence[Any]) -> Any:
        if name in FUSED_GRAPHS.values():
            self._register_operators(options)
        if self._kernels is not None:
            if reason := self.why_not():
                raise ImportError(reason)
            options.register_custom_ops_library(str(self._kernels / CUDA_OPERATORS.file))
            for weight, value in self._common_weights().items():
                options.add_initializer(weight, value)
        return self._runtime.InferenceSession(self._graph_file(name), options, providers=providers)

    def _register_operators(self, options: Any) -> None:
        if reason := CPU_OPERATORS.missing(self.folder):
            raise ImportError(reason)
        library = self.folder / CPU_OPERATORS.file
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # of another system, or for a newer onnxruntime
            raise ImportError(
                f"{library} must load here, got {str(error).splitlines()[0][:300]}; in its folder run: "
                f"{' '.join(CPU_OPERATORS.command())}, or load with fused=False"
            ) from error

    def _common_weights(self) -> dict[str, Any]:
        """The weights that several graphs have, on the device: the sessions share them. numpy has no bfloat16 that
        onnxruntime would take there."""
        for entry in self.manifest["common_weights"] if not self._weights else ():
            if entry["dtype"] != "bfloat16":
                array = np.memmap(
                    self.folder / WEIGHTS_FILE, entry["dtype"], "r", entry["offset"], tuple(entry["shape"])
                )
                # As memory of the caller's: a session does not take over what an OrtValue owns.
                value = self._runtime.OrtValue.from_dlpack(self._ort_value(np.asarray(array)))
                self._weights[entry["name"]] = value
        return self._weights

    def _graph_file(self, name: str) -> str:
        """The file of a graph."""
        return str(self.folder / self.manifest["graphs"][name])

    def _check_session(self, session: Any, name: str) -> None:
        """The graph takes the states that the manifest names."""
        found = {value.name: value.shape for value in session.get_inputs()}
        transposed = name == CUDA_GRAPH  # of K = V alone
        for layer in range(self.config.num_hidden_layers):
            for state, shape in self._shapes.items():
                key = f"past_key_values.{layer}.{transposed_name(state) if transposed else state}"
                want = ["batch", shape[0] * shape[1], *shape[2:]]
                if found.get(key) != want:
                    raise ValueError(
                        f"{self.manifest['graphs'][name]} must take {key} {want} by manifest.json, got "
                        f"{found.get(key)}; the files belong to different models: export again"
                    )

    def close(self) -> None:
        """As :meth:`Runner.close`: sessions, and with them their mappings of the weights."""
        self._sessions.clear()

    def check_structure(self) -> None:
        """As :meth:`Runner.check_structure`, the ONNX checker included."""
        from .structure import check_structure

        check_structure(self.folder, self.manifest)

    def _run(self, ids: NDArray[np.int64], state: State, **inputs: Any) -> tuple[Any, State]:
        name = self._graph_name(ids.shape[1])
        return self._call(FUSED_GRAPHS[name] if self._fused else name, {**self._inputs(ids), **inputs}, state)

    def _call(self, graph: str, inputs: Mapping[str, Any], state: State) -> tuple[Any, State]:
        """One run of a graph into arrays of our own: numpy has no bfloat16 that onnxruntime would take or give."""
        session, past = self._session(graph), self._feeds(state)
        logits = np.empty((*inputs["input_ids"].shape, self.config.vocab_size), np.float32)
        present = {name.replace("past_key_values", "present"): np.empty_like(value) for name, value in past.items()}
        binding = session.io_binding()
        for name, value in {**inputs, **past}.items():
            binding.bind_ortvalue_input(name, ort_value(self._runtime, value))
        for name, value in {"logits": logits, **present}.items():
            binding.bind_ortvalue_output(name, ort_value(self._runtime, value))
        session.run_with_iobinding(binding)
        return logits, self._state(list(present.values()))

    def run_forced(self, input_ids: Any, router_indices: Sequence[Any], state: Any = None) -> tuple[Any, State]:
        """As calling the runner, with the routing given: what is below float32 is compared on the model's own routing.

        Args:
            input_ids: ``[B, T]``.
            router_indices: per layer ``[B, T, k]`` int64 in [0, M).
            state: as there.

        Raises:
            ValueError: the artifact has no such graph; shapes or dtypes that do not fit.
        """
        if FORCED_GRAPH not in self.manifest["graphs"]:
            raise ValueError(
                f"router_indices must be None for this artifact, got some; it has no {FORCED_GRAPH} graph, which "
                "exports below float32 have"
            )
        ids = self._check_ids(input_ids)
        indices = [np.ascontiguousarray(layer, np.int64) for layer in router_indices]
        expected = [(*ids.shape, self.config.topk)] * self.config.num_hidden_layers
        if [layer.shape for layer in indices] != expected:
            raise ValueError(
                f"router_indices must be [B, T, k] = {expected[0]} for each of {len(expected)} layers, got "
                f"{', '.join(str(layer.shape) for layer in indices)}; pass one choice per token and rank"
            )
        inputs = {f"router_indices.{layer}": value for layer, value in enumerate(indices)}
        return self._call(FORCED_GRAPH, {"input_ids": ids, **inputs}, self._check_state(len(ids), state))

    def _graph_name(self, length: int) -> str:
        return "decode" if length == 1 and "decode" in self.manifest["graphs"] else "prefill"

    def _inputs(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        """Everything that a graph takes apart from the state."""
        return {"input_ids": ids}

    def _feeds(self, state: State) -> dict[str, NDArray[Any]]:
        """The graph's inputs: memories and heads (channels) in one axis."""
        return {
            f"past_key_values.{layer}.{name}": np.ascontiguousarray(value).reshape(
                value.shape[0], value.shape[1] * value.shape[2], *value.shape[3:]
            )
            for layer, values in enumerate(state)
            for name, value in values.items()
        }

    def _state(self, present: Sequence[NDArray[Any]]) -> State:
        values = iter(present)
        return tuple(
            {name: array.reshape(array.shape[0], *shape) for (name, shape), array in zip(self._shapes.items(), values)}  # noqa: B905
            for _ in range(self.config.num_hidden_layers)
        )

    def decode_loop(  # type: ignore[override]
        self,
        state: Sequence[Mapping[str, Any]],
        batch_size: int,
        aliased: bool = False,
        touched: bool | None = None,
        transposed: bool | None = None,
        captured: bool = True,
        fused: bool | None = None,
    ) -> Step:
        """As :meth:`Runner.decode_loop`.

        Two sets of buffers are bound to the session and swapped at every step: nothing is allocated or copied.
        ``aliased``: one set, in which every present state overwrites its past. ``captured``: with the CUDA provider's
        option ``enable_cuda_graph`` as a CUDA graph, of a session of its own, aliased because it holds addresses.
        ``touched``: one set, of which only the memories that a token selected are written; None: where the artifact has
        that graph and the CPU runs it. ``transposed``: by the graph whose states are transposed, which is the fast one
        on CUDA; None: there, where the artifact has it. On the CUDA provider the whole states stay on the device.
        ``fused``: by the graph whose nodes are whole layers, operators of ours for the CPU; None: with nothing else
        chosen where the runner takes such graphs, and then in one set of buffers.
        """
        if fused is None:
            fused = self._fused and not (aliased or touched is not None or transposed is not None)
            aliased |= fused
        elif fused:
            self._check_fused()
        if fused and (touched or transposed):
            raise ValueError("only one of fused, touched and transposed must be True, got two; each is a graph")
        has_transposed = CUDA_GRAPH in self.manifest["graphs"]
        if transposed and not has_transposed:
            raise ValueError(
                f"transposed must be False for this artifact, got True; it has no {CUDA_GRAPH} graph: export with "
                "precision float16 a model of a delta rule with value heads as wide as its key heads"
            )
        captured &= self._captures
        aliased |= captured
        if touched is None:
            touched = self.has_touched_decode and not (aliased or transposed or fused or self._on_gpu)
        if touched:
            return self._touched_loop(state, batch_size)
        if transposed is None:
            transposed = has_transposed and self._device == "cuda"
        graph = CUDA_GRAPH if transposed else FUSED_GRAPHS["decode"] if fused else self._graph_name(1)
        # A CUDA graph is of one session and of one set of buffers.
        session = self._open(graph, self._providers) if captured else self._session(graph)
        feeds = self._feeds(self._check_state(batch_size, state))
        if transposed:
            feeds = {
                transposed_name(name): value.swapaxes(2, 3) if name.endswith("recurrent_state") else value
                for name, value in feeds.items()
            }
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        sets = [
            {name: self._ort_value(array.copy()) for name, array in feeds.items()} for _ in range(1 if aliased else 2)
        ]
        ids = np.zeros((batch_size, 1), np.int64)
        inputs = {name: self._ort_value(value) for name, value in self._inputs(ids).items()}
        logits = self._ort_value(np.zeros((batch_size, 1, self.config.vocab_size), np.float32))
        bindings = []
        for source, target in ((sets[0], sets[-1]), (sets[-1], sets[0])):
            binding = session.io_binding()
            for name, value in {**inputs, **source}.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("logits", logits)
            for name, value in target.items():
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
            bindings.append(binding)
        if captured:  # onnxruntime runs the first token more than once
            session.run_with_iobinding(bindings[0])
            for name, value in sets[0].items():
                value.update_inplace(feeds[name])
        steps = 0

        def step(tokens: NDArray[Any]) -> NDArray[np.float32]:
            nonlocal steps
            inputs["input_ids"].update_inplace(np.ascontiguousarray(tokens, np.int64).reshape(batch_size, 1))
            session.run_with_iobinding(bindings[steps % 2])
            steps += 1
            return logits.numpy()[:, 0]

        return step

    def _ort_value(self, array: NDArray[Any]) -> Any:
        """A copy on the provider's device; on the CPU the memory of the array itself."""
        return ort_value(self._runtime, array, self._device)

    def decode_ways(self) -> dict[str, dict[str, Any]]:
        """As :meth:`Runner.decode_ways`."""
        ways: dict[str, dict[str, Any]] = {
            "": {"touched": False, "captured": False},
            "past and present in one buffer": {"aliased": True, "captured": False},
        }
        if self._captures:
            ways["as a CUDA graph"] = {}
        if self.has_touched_decode:
            ways["touched memories written back"] = {"touched": True}
        if CUDA_GRAPH in self.manifest["graphs"]:
            ways["states transposed, as on CUDA"] = {"touched": False, "transposed": True}
        if self._fused:
            ways["fused layers"] = {"fused": True, "aliased": True}
            ways["fused layers, two buffers"] = {"fused": True}
        return ways

    def prefill_ways(self) -> dict[str, Runner]:
        """As :meth:`Runner.prefill_ways`."""
        if not self._fused:
            return {"": self}
        own = type(self)(self.folder, self.manifest, self._providers, self._prepack, self._threads, fused=False)
        return {"": own, "fused layers": self}

    def not_run(self) -> dict[str, str]:
        """As :meth:`Runner.not_run`."""
        reason = CPU_OPERATORS.missing(self.folder) if self._has_fused else None
        return {} if reason is None else {"fused layers": reason}

    def _check_fused(self) -> None:
        if not self._has_fused:
            raise ValueError(
                "fused must be False for this artifact, got True; operators of ours for the CPU has one of --to "
                "onnxruntime in float32"
            )

    @property
    def has_touched_decode(self) -> bool:
        """Whether the artifact has a decode graph that gives only the memories a token selected."""
        return TOUCHED_GRAPH in self.manifest["graphs"]

    def _touched_loop(self, state: Sequence[Mapping[str, Any]], batch_size: int) -> Step:
        if not self.has_touched_decode:
            raise ValueError(
                f"touched must be False for this artifact, got True; it has no {TOUCHED_GRAPH} graph: export with "
                "--to onnxruntime a model with topk < num_memories"
            )
        session, runtime = self._session(TOUCHED_GRAPH), self._runtime
        # An OrtValue on the CPU is the memory of its array: what is written into the array, the next step reads.
        whole = {name: array.copy() for name, array in self._feeds(self._check_state(batch_size, state)).items()}
        ids = np.zeros((batch_size, 1), np.int64)
        binding = session.io_binding()
        for name, array in {"input_ids": ids, **whole}.items():
            binding.bind_ortvalue_input(name, ort_value(runtime, array))
        outputs = {}
        for value in session.get_outputs():
            dtype = array_dtype(_DTYPES[value.type])
            outputs[value.name] = np.zeros((batch_size, *value.shape[1:]), dtype)
            binding.bind_ortvalue_output(value.name, ort_value(runtime, outputs[value.name]))
        rows = np.arange(batch_size)[:, None]
        writes = []
        for name, array in whole.items():
            layer, state_name = name.split(".")[1:]
            memories = self._shapes[state_name][0]
            index = outputs[f"present.{layer}.touched_index"]
            part = outputs[f"present.{layer}.touched_{state_name.removeprefix('recurrent_')}"]
            target = array.reshape(batch_size, memories, -1)  # a view: the array is contiguous
            writes.append((target, index, part.reshape(batch_size, index.shape[1], -1)))

        def step(tokens: NDArray[Any]) -> NDArray[np.float32]:
            ids[:, 0] = tokens
            session.run_with_iobinding(binding)
            for target, index, part in writes:
                target[rows, index] = part
            return outputs["logits"][:, 0]

        return step


def _uncaptured(providers: Sequence[Any]) -> list[Any]:
    """Providers without CUDA graphs."""

    def plain(provider: Any) -> Any:
        if isinstance(provider, str) or str(provider[1].get("enable_cuda_graph", "0")) == "0":
            return provider
        return provider[0], {**provider[1], "enable_cuda_graph": "0"}

    return [plain(provider) for provider in providers]


def transposed_name(name: str) -> str:
    """The name of a state, or of a graph's input or output of it, in CUDA_GRAPH."""
    return name.replace("recurrent_state", TRANSPOSED_STATE)
