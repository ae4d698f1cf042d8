"""The dtype in which an artifact takes and gives the recurrent state; its arithmetic is float32 all the same.

A ``conv_state`` is small and stays float32, as :meth:`MoMForCausalLM.init_state` has it. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import require

# Dtype -> what rounding the state at every step may add to the relative error of 64 decode steps.
DECODE_ERRORS = {"float32": 0.0, "float16": 2e-2, "bfloat16": 2e-2}
# Dtype -> what rounding it once may add to the relative error of the state: half a unit in the last place.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
BFLOAT16 = 16  # onnx.TensorProto


def check_state_dtype(state_dtype: str, allowed: tuple[str, ...] = tuple(ROUNDING)) -> None:
    """Raise ValueError for a dtype that a state cannot have in an artifact."""
    if state_dtype not in allowed:
        raise ValueError(f"state_dtype must be one of {', '.join(allowed)}, got {state_dtype!r}; choose one of them")


def state_dtype_of(manifest: Mapping[str, Any]) -> str:
    """The dtype of the recurrent state."""
    dtypes = {entry["name"]: entry.get("dtype", "float32") for entry in manifest["state"]}
    return str(dtypes["recurrent_state"])


def array_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of this name; bfloat16 is that of ml_dtypes.

    Raises:
        ImportError: bfloat16 without ml_dtypes.
    """
    return np.dtype(require("ml_dtypes", "onnx").bfloat16 if name == "bfloat16" else name)


def ort_value(runtime: Any, array: NDArray[Any], device: str = "cpu") -> Any:
    """An OrtValue: on the CPU the memory of the array itself, else a copy on the device."""
    if array.dtype.name == "bfloat16":
        return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
    return runtime.OrtValue.ortvalue_from_numpy(array, device, 0)
