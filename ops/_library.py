"""Registration of operators in the ``mom`` namespace: implementation, fake, autograd and autocast in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.library import custom_op

from ._triton import use_triton

NAMESPACE = "mom"
TRITON_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Operator -> its Triton implementation."""
AUTOCAST_DEVICES = ("cpu", "cuda")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register_op(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    mutates_args: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autocast: Sequence[str] = (),
) -> Any:
    """Register ``mom::<name>`` and return its overload.

    Args:
        name: operator name without the namespace.
        schema: argument and return part of the schema, such as ``(Tensor x, int n) -> Tensor``.
        fake: shapes and dtypes of the results for given inputs; no data.
        cpu: the PyTorch implementation.
        triton: the Triton implementation; serves CUDA tensors, and CPU tensors under ``TRITON_INTERPRET=1``.
            Without it ``cpu`` serves every device, so it must then be free of host reads.
        mutates_args: names of arguments written in place.
        backward, setup_context: as for :func:`torch.library.register_autograd`.
        autocast: names of the arguments that ``torch.autocast`` casts; every other one keeps its dtype.
    """

    positions: list[int] = []  # of the arguments written in place

    def implementation(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        # A backward that is called under autocast comes here with it on: an implementation chooses its own dtypes.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            if triton is None:
                return cpu(*args)
            if use_triton(args):
                return triton(*args)
            device = next(x.device for x in args if isinstance(x, Tensor))
            return cpu(*args) if device.type == "cpu" else _on_cpu(cpu, args, positions, device)

    op = custom_op(f"{NAMESPACE}::{name}", implementation, mutates_args=tuple(mutates_args), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    positions += [i for i, argument in enumerate(overload._schema.arguments) if argument.name in mutates_args]
    if triton is not None:
        TRITON_IMPLEMENTATIONS[overload] = triton
    if autocast:
        _register_autocast(name, overload, autocast)
    return overload


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Forward-mode differentiation would silently give zeros: torch gives custom operators no rule for it.

    A tangent of ``torch.func.jvp`` cannot be seen from here, so inside one no floating-point argument passes.
    """
    for value in args:
        if isinstance(value, Tensor) and value.is_floating_point():
            if eager_transforms.JVP_NESTING > 0 or forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    f"{NAMESPACE}::{name} must get arguments without a tangent, got forward-mode differentiation, for "
                    "which it has no rule; use torch.autograd.grad"
                )


def _on_cpu(function: Callable[..., Any], args: Sequence[Any], written: Sequence[int], device: torch.device) -> Any:
    """Run on copies in host memory and bring the results back (float64 on a GPU: for verification, not for speed)."""
    moved = [x.cpu() if isinstance(x, Tensor) else x for x in args]
    results = function(*moved)
    for position in written:
        if moved[position] is not None:
            args[position].copy_(moved[position])
    if results is None:
        return None
    if isinstance(results, Tensor):
        return results.to(device)
    return tuple(x.to(device) for x in results)


_autocast_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _register_autocast(name: str, overload: Any, cast: Sequence[str]) -> None:
    """Cast only the named arguments: torch's own register_autocast casts the decay, beta and the state as well."""
    names = [argument.name for argument in overload._schema.arguments]
    positions = [names.index(argument) for argument in cast]

    for device in AUTOCAST_DEVICES:
        key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

        def kernel(_: Any, *args: Any, device: str = device, key: Any = key) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast_args = list(args)
            for position in positions:
                value = args[position] if position < len(args) else None
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                    cast_args[position] = value.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*cast_args)

        _autocast_library.impl(name, kernel, "Autocast" + torch._C._dispatch_key_for_device(device), with_keyset=True)
