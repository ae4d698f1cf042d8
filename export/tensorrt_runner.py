"""Running a TensorRT artifact: its engines on a GPU, or the graphs they were built from in onnxruntime."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import require
from ._tensorrt import require_tensorrt
from ._tensorrt_provider import PROVIDER, provider_session
from .onnx_runner import TOUCHED_GRAPH, OnnxRunner
from .runner import Runner, State, Step
from .tensorrt_shapes import check_batch


def open_tensorrt(folder: Path, manifest: Mapping[str, Any], **options: Any) -> Runner:
    """The engines on a GPU, or with ``providers`` the graphs in onnxruntime."""
    if "providers" in options:
        return GraphRunner(folder, manifest, **options)
    return TensorRTRunner(folder, manifest, **options)


class GraphRunner(OnnxRunner):
    """The graphs of a TensorRT artifact in onnxruntime: on its TensorRT-RTX provider alone, or on others.

    On the CPU those of bfloat16 have float32 activations, as its CPU provider has no bfloat16.
    """

    _widened: tempfile.TemporaryDirectory[str] | None = None

    def _create_session(self, name: str, options: Any, providers: Sequence[Any]) -> Any:
        if self._providers != [PROVIDER]:
            return super()._create_session(name, options, providers)
        settings = self.manifest["provider_options"][name]
        return provider_session(self._runtime, super()._graph_file(name), options, settings)

    def _graph_file(self, name: str) -> str:
        if self.manifest["precision"] != "bfloat16" or self._providers != ["CPUExecutionProvider"]:
            return super()._graph_file(name)
        if self._widened is None:
            self._widened = tempfile.TemporaryDirectory(prefix="mom-compile-")
        target = Path(self._widened.name) / self.manifest["graphs"][name]
        widen_bfloat16(Path(super()._graph_file(name)), target)
        return str(target)


def widen_bfloat16(source: Path, target: Path) -> None:
    """Save a graph with its bfloat16 values as float32."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(source))

    def widen(graph: Any) -> None:
        for tensor in graph.initializer:
            widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                    attribute.i = onnx.TensorProto.FLOAT
                widen_tensor(attribute.t)
                for body in (attribute.g, *attribute.graphs):
                    widen(body)

    def widen_tensor(tensor: Any) -> None:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    widen(model.graph)
    data = target.with_suffix(".bin").name
    onnx.save(model, str(target), save_as_external_data=True, location=data, size_threshold=1024)


class Engine:
    """One engine and its execution context: device addresses in, device addresses out.

    Args:
        file: the serialized engine.
        version: of the TensorRT for RTX that built it; None: trtexec of this device did, for the full TensorRT.

    Raises:
        ImportError: TensorRT is missing.
        ValueError: an engine of another version, or one that this GPU and driver do not open.
    """

    def __init__(self, file: Path, version: str | None) -> None:
        self.tensorrt = tensorrt = _full_tensorrt() if version is None else require_tensorrt()
        if version is not None and tensorrt.__version__ != version:
            raise ValueError(
                f"{file.name} must be run by TensorRT for RTX {version}, which built it, got {tensorrt.__version__}; "
                f'run: pip install "tensorrt-rtx-cu13-libs=={version}" "tensorrt-rtx-cu13-bindings=={version}", or '
                "export again"
            )
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise ValueError(
                f"{file.name} must open on this GPU with its driver, got one that TensorRT {tensorrt.__version__} "
                "refuses; update the driver, or build it again for this GPU"
            )
        self._engine = engine
        if version is None:
            self._context = engine.create_execution_context()
        else:  # TensorRT for RTX captures a CUDA graph by itself, anew where shapes change
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = tensorrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._context = engine.create_execution_context(config)

    def enqueue(self, addresses: Mapping[str, int], shapes: Mapping[str, Sequence[int]], stream: int) -> None:
        """Run on a stream.

        Args:
            addresses: of every input and output in device memory.
            shapes: of every input.
            stream: a CUDA stream's handle.

        Raises:
            ValueError: shapes outside the engine's profile.
            RuntimeError: the engine did not run.
        """
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                raise ValueError(
                    f"{name} must have a shape within the engine's profile, got {tuple(shape)}; manifest.json has it"
                )
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT {self.tensorrt.__version__} must run the engine, got a failure; see its log")


def _full_tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise ImportError(
            f"tensorrt must be installed on the device, got {error}; run: apt-get install python3-libnvinfer"
        ) from error


class TensorRTRunner(Runner):
    """A folder of ``to_tensorrt`` on a GPU; logits and states are tensors there.

    Args:
        folder: the artifact.
        manifest: of the folder.
        device: a CUDA device.

    Raises:
        ImportError: TensorRT for RTX or torch is missing.
        ValueError: no GPU, or one that the engines were not built for.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str = "cuda") -> None:
        super().__init__(folder, manifest)
        self._torch = require("torch", "tensorrt-rtx")
        self.device = self._torch.device(device)
        self._check_device()
        self._engines: dict[str, Engine] = {}

    def _check_device(self) -> None:
        instead = 'load(folder, providers=["CPUExecutionProvider"]) runs the same graphs in onnxruntime'
        wanted = ", ".join(f"{value // 10}.{value % 10}" for value in self.manifest["compute_capabilities"])
        cuda = self._torch.cuda
        if self.device.type != "cuda" or not cuda.is_available():
            raise ValueError(
                f"device must be a CUDA GPU of compute capability {wanted} to run engines, got {self.device} and "
                f"{'a' if cuda.is_available() else 'no'} GPU; {instead}"
            )
        major, minor = cuda.get_device_capability(self.device)
        if 10 * major + minor not in self.manifest["compute_capabilities"]:
            raise ValueError(
                f"device must have compute capability {wanted}, which the engines were built for, got {major}.{minor}; "
                f"export with --compute-capability {10 * major + minor}, or {instead}"
            )

    def check_structure(self) -> None:
        """As :meth:`Runner.check_structure`, of the graphs that the engines were built from."""
        from .structure import check_structure

        check_structure(self.folder, self.manifest)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            file = self.folder / self.manifest["engines"][name]["file"]
            if not file.is_file():
                raise ValueError(f"{file.name} must be built on the device first, got no such file; run: sh build.sh")
            self._engines[name] = Engine(file, self.manifest["versions"].get("tensorrt-rtx"))
        return self._engines[name]

    @property
    def _decode_graph(self) -> str:
        return TOUCHED_GRAPH if TOUCHED_GRAPH in self.manifest["engines"] else "decode"

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def _value(self, value: Any) -> Any:
        return self._torch.as_tensor(value, device=self.device)

    def _convert(self, value: Any, dtype: str) -> Any:
        return value.to(getattr(self._torch, dtype))

    def _check_ids(self, input_ids: Any) -> NDArray[np.int64]:
        return super()._check_ids(input_ids.cpu() if isinstance(input_ids, self._torch.Tensor) else input_ids)

    def _run(self, ids: NDArray[np.int64], state: State) -> tuple[Any, State]:
        name = self._decode_graph if ids.shape[1] == 1 else "prefill"
        self._check_batch(ids.shape[0], name)
        if name != "prefill":
            logits = self._zeros((ids.shape[0], 1, self.config.vocab_size), "float32")
            step = _Decode(self, state, ids.shape[0], logits)
            step(self._torch.from_numpy(ids).to(self.device))
            return logits, step.state()
        pieces = []
        piece = self.manifest["ranges"]["length"][2]
        for start in range(0, ids.shape[1], piece):
            logits, state = self._prefill(ids[:, start : start + piece], state)
            pieces.append(logits)
        return self._torch.cat(pieces, 1), state

    def _check_batch(self, batch: int, name: str) -> None:
        check_batch(self.manifest["ranges"], batch, self.manifest["engines"][name]["file"])

    def _prefill(self, ids: NDArray[np.int64], state: State) -> tuple[Any, State]:
        tokens = self._torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)
        logits = self._zeros((*ids.shape, self.config.vocab_size), "float32")
        present = tuple({name: self._torch.empty_like(value) for name, value in layer.items()} for layer in state)
        past = self.flat(state, "past_key_values")
        self.enqueue("prefill", {"input_ids": tokens, **past}, {"logits": logits, **self.flat(present, "present")})
        return logits, present

    def flat(self, state: State, prefix: str) -> dict[str, Any]:
        """The state as the graphs name and shape it, without a copy where it is contiguous."""
        return {
            f"{prefix}.{layer}.{name}": value.contiguous().flatten(1, 2)
            for layer, values in enumerate(state)
            for name, value in values.items()
        }

    def enqueue(self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run an engine on the current stream, on tensors of its inputs and outputs."""
        shapes = {key: tuple(value.shape) for key, value in inputs.items()}
        addresses = {key: value.data_ptr() for key, value in {**inputs, **outputs}.items()}
        self._engine(name).enqueue(addresses, shapes, self._stream())

    def _stream(self) -> int:
        return int(self._torch.cuda.current_stream(self.device).cuda_stream)

    def decode_loop(self, state: Sequence[Mapping[str, Any]], batch_size: int, **options: Any) -> Step:
        """As :meth:`Runner.decode_loop`: two sets of state buffers that are swapped at every step, or one of which the
        selected memories are written back."""
        self._check_batch(batch_size, self._decode_graph)
        logits = self._zeros((batch_size, 1, self.config.vocab_size), "float32")
        decode = _Decode(self, self._check_state(batch_size, state), batch_size, logits)

        def step(tokens: NDArray[Any]) -> NDArray[np.float32]:
            ids = np.ascontiguousarray(tokens, np.int64).reshape(batch_size, 1)
            decode(self._torch.from_numpy(ids).to(self.device))
            result: NDArray[np.float32] = logits[:, 0].cpu().numpy()
            return result

        return step


class _Decode:
    """Decode steps on buffers of their own; ``state`` is copied in, ``logits`` is written by every step."""

    def __init__(self, runner: TensorRTRunner, state: State, batch: int, logits: Any) -> None:
        self._runner, self._logits, self._steps = runner, logits, 0
        self._touched = runner._decode_graph == TOUCHED_GRAPH
        self._ids = runner._torch.zeros((batch, 1), dtype=runner._torch.int64, device=runner.device)
        own = tuple({name: value.clone() for name, value in layer.items()} for layer in state)
        self._sets = [own]
        if self._touched:
            torch = runner._torch
            self._parts = {
                value["name"]: torch.zeros(
                    (batch, *value["shape"][1:]), dtype=getattr(torch, value["dtype"]), device=runner.device
                )
                for value in runner.manifest["io"][TOUCHED_GRAPH]["outputs"]
                if value["name"] != "logits"
            }
            self._rows = torch.arange(batch, device=runner.device).unsqueeze(1)
        else:
            self._sets.append(tuple({name: value.clone() for name, value in layer.items()} for layer in state))

    def __call__(self, ids: Any) -> None:
        """One token for every row: ids ``[B, 1]`` int64 on the device."""
        self._ids.copy_(ids)
        runner, past = self._runner, self.state()
        inputs = {"input_ids": self._ids, **runner.flat(past, "past_key_values")}
        if self._touched:
            runner.enqueue(TOUCHED_GRAPH, inputs, {"logits": self._logits, **self._parts})
            self._write_back(past)
        else:
            present = self._sets[(self._steps + 1) % 2]
            runner.enqueue("decode", inputs, {"logits": self._logits, **runner.flat(present, "present")})
        self._steps += 1

    def state(self) -> State:
        """After the steps so far."""
        return self._sets[self._steps % len(self._sets)]

    def _write_back(self, state: State) -> None:
        for layer, values in enumerate(state):
            index = self._parts[f"present.{layer}.touched_index"]
            for name, value in values.items():
                part = self._parts[f"present.{layer}.touched_{name.removeprefix('recurrent_')}"]
                value[self._rows, index] = part.view(*index.shape, *value.shape[2:])
