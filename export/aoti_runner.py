"""Running an AOTInductor artifact from Python; it needs torch, none of our operators and no compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._files import read_safetensors
from .runner import State
from .torch_runner import WEIGHTS_FILE, TorchRunner

DEVICES = ("cpu", "cuda")
CPU_LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""Vector instructions as torch names them; each machine of x86-64 runs what was compiled for an earlier one."""


class AotiRunner(TorchRunner):
    """A folder of ``to_aoti``; logits and states are tensors on the device that it was compiled for.

    Args:
        folder: the artifact.
        manifest: of the folder.
        device: None, or the device again, such as ``cuda:1``.

    Raises:
        ValueError: compiled for another device, instruction set or version of torch.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], device: str | torch.device | None = None) -> None:
        compiled = manifest["device"]
        super().__init__(folder, manifest, compiled["type"] if device is None else device)
        check_device(compiled, self.device)
        check_torch(manifest["versions"]["torch"])
        weights = read_safetensors(folder / WEIGHTS_FILE)
        self._weights = {name: weight.to(self.device) for name, weight in weights.items()}
        self._packages: dict[str, Any] = {}

    def check_structure(self) -> None:
        """As :meth:`Runner.check_structure`: the packages take the states in the manifest's order."""
        shapes = {entry["name"]: (1, *entry["shape"]) for entry in self.manifest["state"]}
        names = [(layer, name) for layer in range(self.config.num_hidden_layers) for name in shapes]
        for name, file in self.manifest["graphs"].items():
            found, expected = self._package(name).get_metadata().get("mom_state"), state_inputs(shapes, names)
            if found != expected:
                raise ValueError(f"{file} must take the states {expected}, got {found}; export again")

    def _package(self, name: str) -> Any:
        if name not in self._packages:
            file = self.manifest["graphs"][name]
            try:
                package = open_package(self.folder / file, -1 if self.device.index is None else self.device.index)
                # Both packages read these very tensors.
                wanted = package.get_constant_fqns()
                package.load_constants({key: self._weights[key] for key in wanted}, False, True, True)
            except (RuntimeError, KeyError) as error:
                raise ValueError(
                    f"{file} must open in torch {torch.__version__}, got {str(error).splitlines()[0][:300]}; "
                    f"it was compiled with {self.manifest['versions']['torch']}: install that version, or export again"
                ) from error
            self._packages[name] = package
        return self._packages[name]

    @torch.no_grad()
    def _run(self, ids: NDArray[np.int64], state: State) -> tuple[torch.Tensor, State]:
        package = self._package("decode" if ids.shape[1] == 1 else "prefill")
        past = [value.contiguous() for layer in state for value in layer.values()]
        logits, *present = package.boxed_run([torch.from_numpy(ids).to(self.device), *past])
        values = iter(present)
        return logits, tuple({name: next(values) for name in layer} for layer in state)


def open_package(path: Path, device_index: int = -1) -> Any:
    """torch's loader of one package."""
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, device_index)


def state_inputs(shapes: Mapping[str, Sequence[int]], names: Sequence[tuple[int, str]]) -> str:
    """The states in a package's order as its metadata has them, ``0.conv_state=5,48,3;...``, the batch left out."""
    return ";".join(f"{layer}.{name}={','.join(map(str, shapes[name][1:]))}" for layer, name in names)


def describe_device(kind: str) -> dict[str, str]:
    """What this machine compiles for: ``type``, and the vector instructions or the GPU's compute capability."""
    if kind == "cuda":
        return {"type": "cuda", "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability())}
    return {"type": "cpu", "architecture": torch.backends.cpu.get_cpu_capability()}


def check_device(compiled: Mapping[str, str], device: torch.device) -> None:
    """Raise unless packages compiled for one device run on the other."""
    if device.type != compiled["type"]:
        raise ValueError(
            f"device must be {compiled['type']}, for which the packages were compiled, got {device.type}; "
            f"export again with device={device.type!r}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be there, got cuda, for which the packages were compiled; export for the CPU")
    wanted, found = compiled["architecture"], describe_device(device.type)["architecture"]
    runs = wanted == found
    if wanted in CPU_LEVELS and found in CPU_LEVELS:
        runs = CPU_LEVELS.index(wanted) <= CPU_LEVELS.index(found)
    if not runs:
        raise ValueError(
            f"{device.type} must have {wanted}, for which the packages were compiled, got {found}; export again here"
        )


def check_torch(version: str) -> None:
    """Raise unless this torch has the binary interface of the one that compiled: the same major and minor version."""
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        release = version.split("+")[0]
        raise ValueError(
            f"torch must be {'.'.join(version.split('.')[:2])}, with which the packages were compiled, got "
            f"{torch.__version__}; run: pip install torch=={release}, or export again"
        )
