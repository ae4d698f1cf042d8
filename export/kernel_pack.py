"""Writing a kernel pack: the Triton kernels of a model as binaries, with a table to launch them without Python."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import atomic_directory
from ..config import MoMConfig
from ..model import MoMForCausalLM
from ..ops._aot import Binary, compile_variant
from ..ops._kernel_variant import SHARED_MEMORY_KB
from .artifact import check_replaceable, write_manifest
from .kernel_function import Dtypes, Function
from .kernel_functions import functions
from .kernel_table import Argument, Entry, entries
from .launch_formula import Formula
from .operator_library import copy_sources
from .prefill_functions import ORDER
from .writing import package_versions, schemas_sha256

ARCHITECTURES = (80, 86, 87, 89, 90, 120)
"""Compute capabilities times ten that a pack holds by default."""
HEADER = "mom_kernels.h"
SOURCES = ("mom_launch.h", "mom_launch.cpp", "mom_plugin.cpp")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i32": 4, "i64": 8, "u8": 1}
_KINDS = {"i32": "MOM_INT32", "fp32": "MOM_FLOAT32"}


def to_kernels(
    model: MoMForCausalLM,
    directory: str | os.PathLike[str],
    compute_capabilities: Sequence[int] = ARCHITECTURES,
) -> dict[str, Any]:
    """Write the kernels of a model for applications without Python.

    The folder holds, per architecture, a cubin and the PTX of each kernel of decode and of prefill, which need nothing
    else but plain matrix products; ``mom_kernels.h``, a C header with the order of a prefill and the launch table:
    symbol, grid formula, threads, shared memory, whether it may overlap the kernel before it, arguments in order with
    types and sizes, constants; ``mom_launch.h`` and ``mom_launch.cpp``, a launcher on the CUDA driver API;
    ``mom_plugin.cpp``, the decode step as a TensorRT plugin; and ``manifest.json``. Grid and sizes are formulas in the
    batch, or in tokens, sequences and chunks.

    Args:
        model: its sizes, rules and dtype (float32, bfloat16 or float16) are compiled in; its weights are not written.
        directory: a new folder, or an artifact to replace.
        compute_capabilities: compute capabilities times ten.

    Returns:
        The manifest's entries.

    Raises:
        ValueError: an architecture or dtype without kernels, sizes for which a kernel does not fit the GPU or is unsafe
            on it, a folder that holds something else.
    """
    folder, dtype = Path(directory), model.lm_head.weight.dtype
    check_compute_capabilities(compute_capabilities)
    if dtype not in _DTYPES:
        raise ValueError(
            f"model must have parameters of float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}; "
            "convert it with .to(torch.bfloat16)"
        )
    check_replaceable(folder)
    with atomic_directory(folder, keep=False) as staging:
        described = write_pack(staging, model.config, Dtypes(dtype, dtype), compute_capabilities, SOURCES)
        manifest = {
            "kind": "kernels",
            "target": "kernels",
            "config": model.config.to_dict(),
            "dtype": str(dtype).removeprefix("torch."),
            "compute_capabilities": list(dict.fromkeys(compute_capabilities)),
            "functions": described,
            "schemas_sha256": schemas_sha256(),
            "versions": {**package_versions("mom-compile", "torch", "triton"), "python": platform.python_version()},
        }
        write_manifest(staging, manifest)
    return manifest


def write_pack(
    folder: Path, config: MoMConfig, dtypes: Dtypes, compute_capabilities: Sequence[int], sources: Sequence[str]
) -> dict[str, Any]:
    """The kernels, their header and the source files of that name; returns what the functions are, by name.

    Raises:
        ValueError: sizes for which a kernel does not fit the GPU or is unsafe on it.
    """
    listed = list(functions(config, dtypes))
    kernels: list[tuple[Entry, Binary, str]] = []
    for architecture in dict.fromkeys(compute_capabilities):
        for function in listed:
            kernels += _compile(folder, function, architecture)
    (folder / HEADER).write_text(header(config, listed, kernels), encoding="utf-8")
    copy_sources(sources, folder)
    return {function.name: _describe(function, kernels) for function in listed}


def check_compute_capabilities(compute_capabilities: Sequence[int]) -> None:
    """Raise ValueError unless there are some, all of them with configurations."""
    known = ", ".join(str(architecture) for architecture in SHARED_MEMORY_KB)
    unknown = [architecture for architecture in compute_capabilities if architecture not in SHARED_MEMORY_KB]
    if unknown or not compute_capabilities:
        raise ValueError(
            f"compute_capabilities must be some of {known} (compute capability times ten), got "
            f"{', '.join(map(str, unknown)) or 'none'}; leave out what the kernels are not configured for"
        )


def _compile(folder: Path, function: Function, architecture: int) -> Iterator[tuple[Entry, Binary, str]]:
    for entry in entries(function, architecture):
        binary = compile_variant(entry.variant, architecture)
        if binary.hazards:
            raise ValueError(
                f"compute_capabilities must have a safe configuration of {entry.name} for these head sizes, got for "
                f"sm_{architecture}: {'; '.join(binary.hazards)}; leave {architecture} out, or use another dtype"
            )
        stem = f"sm{architecture}/{entry.name}.{entry.smallest}"
        path = folder / f"{stem}.cubin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(binary.cubin)
        path.with_suffix(".ptx").write_text(binary.ptx, encoding="utf-8")
        yield entry, binary, stem


def _describe(function: Function, kernels: Iterable[tuple[Entry, Binary, str]]) -> dict[str, Any]:
    mine = [item for item in kernels if item[0].name.startswith(function.name + ".")]
    described: dict[str, Any] = {"operator": function.operator, "units": list(function.units), "kernels": []}
    if not mine:
        described["note"] = "no kernel of its own at these sizes: the operator is a matrix product of the library"
    for entry, binary, stem in mine:
        described["kernels"].append(
            {
                "name": entry.name,
                "symbol": binary.symbol,
                "architecture": binary.architecture,
                "files": [f"{stem}.cubin", f"{stem}.ptx"],
                "first_unit": [entry.smallest, entry.largest],
                "grid": [axis.text(function.units) for axis in entry.grid],
                "threads": 32 * entry.variant.num_warps,
                "shared_bytes": binary.shared,
                "overlap": entry.overlap,
                "registers": binary.registers,
                "spilled_bytes": binary.spills,
                "arguments": [_describe_argument(argument, function.units) for argument in entry.arguments],
                "constants": {name: value for name, value in entry.variant.constants.items() if value is not None},
            }
        )
    return described


def _describe_argument(argument: Argument, units: Sequence[str]) -> dict[str, Any]:
    described: dict[str, Any] = {"name": argument.name, "type": argument.type}
    if argument.shape is not None:
        described["shape"] = [axis.text(units) for axis in argument.shape]
    else:
        described["value"] = argument.value.text(units) if isinstance(argument.value, Formula) else argument.value
    return described


def header(config: MoMConfig, listed: Sequence[Function], kernels: Sequence[tuple[Entry, Binary, str]]) -> str:
    """The order of a prefill, the functions and the launch table as C."""
    lists: dict[str, str] = {}
    rows = []
    for entry, binary, stem in kernels:
        body = "".join(f"    {_c_argument(argument)},\n" for argument in entry.arguments)
        name = lists.setdefault(body, f"mom_arguments_{len(lists)}")
        constants = " ".join(f"{key}={value}" for key, value in entry.variant.constants.items() if value is not None)
        grid = ", ".join(map(_c_formula, entry.grid))
        rows.append(
            f'    {{"{entry.name}", "{binary.symbol}", "{stem}.cubin", "{stem}.ptx",\n'
            f'     "{constants}",\n'
            f"     {binary.architecture}, {entry.smallest}, {entry.largest}, {{{grid}}}, "
            f"{32 * entry.variant.num_warps}, {binary.shared}, {int(entry.overlap)}, "
            f"{len(entry.arguments)}, {binary.hidden}, {name}}},\n"
        )
    arguments = "".join(f"static const mom_argument {name}[] = {{\n{body}}};\n" for body, name in lists.items())
    names = "".join(f"    {_c_function(one)},\n" for one in listed)
    order = "\n".join(f" * {line}".rstrip() for line in ORDER.splitlines())
    memories, shared = config.num_memories, int(config.shared_mem)
    return (
        "/* The launch table of this pack, written by mom-compile. One source file, mom_launch.cpp, defines\n"
        " * MOM_KERNELS_DEFINE before it includes this header.\n *\n"
        f"{order} */\n"
        "#ifndef MOM_KERNELS_H\n#define MOM_KERNELS_H\n\n"
        '#include "mom_launch.h"\n\n'
        "#ifdef __cplusplus\n#define MOM_TABLE extern \"C\"\n#else\n#define MOM_TABLE extern\n#endif\n\n"
        f"#define MOM_TOPK {config.topk}\n#define MOM_MEMORIES {memories} /* without the shared one */\n"
        f"#define MOM_SHARED {shared}\n\n"
        "/* Chunks of 64 rows that suffice for any routing. */\n"
        "static inline uint32_t mom_chunks(uint32_t sequences, uint32_t tokens) {\n"
        "    const uint64_t routed = (uint64_t)tokens * MOM_TOPK + (uint64_t)sequences * MOM_MEMORIES * 63;\n"
        "    return (uint32_t)(routed / 64 + MOM_SHARED * (((uint64_t)tokens + (uint64_t)sequences * 63) / 64));\n}\n\n"
        "MOM_TABLE const uint32_t mom_function_count;\nMOM_TABLE const mom_function mom_functions[];\n"
        "MOM_TABLE const uint32_t mom_kernel_count;\nMOM_TABLE const mom_kernel mom_kernels[];\n\n"
        f"#ifdef MOM_KERNELS_DEFINE\n{arguments}"
        f"const uint32_t mom_function_count = {len(listed)};\n"
        f"const mom_function mom_functions[] = {{\n{names}}};\n"
        f"const uint32_t mom_kernel_count = {len(rows)};\n"
        f"const mom_kernel mom_kernels[] = {{\n{''.join(rows)}}};\n#endif\n#endif\n"
    )  # fmt: skip


def _c_argument(argument: Argument) -> str:
    if argument.shape is not None:
        kind, real, amount = "MOM_POINTER", 0.0, _bytes(argument)
    else:
        kind, real, amount = _KINDS[argument.type], 0.0, Formula(0)
        if isinstance(argument.value, Formula):
            amount = argument.value
        elif argument.value is not None:
            real = struct.unpack("f", struct.pack("f", argument.value))[0]  # as the launch rounds it
    return f'{{"{argument.name}", "{argument.type}", {kind}, {_c_formula(amount)}, {real!r}f}}'


def _c_formula(formula: Formula) -> str:
    per_unit = ", ".join(map(str, formula.per_unit))
    blocks = f"{formula.times}, {formula.each}, {formula.per}, {formula.unit}"
    return f"{{{formula.base}, {{{per_unit}}}, {blocks}, {int(formula.digits)}}}"


def _c_function(function: Function) -> str:
    units = [*(f'"{unit}"' for unit in function.units), "0", "0"][:3]
    return f'{{"{function.name}", "{function.operator}", {{{", ".join(units)}}}}}'


def _bytes(argument: Argument) -> Formula:
    """Bytes behind a pointer: at most one axis of a tensor depends on an open size."""
    assert argument.shape is not None
    total = Formula(_BYTES[argument.type.removeprefix("*")])
    for axis in argument.shape:
        assert total.constant or axis.constant, f"{argument.name} has two open axes"
        total = total * axis.base if axis.constant else axis * total.base
    return total
