"""Errors for wrong arguments: ``<argument> must <rule>, got <value>; <what to do>``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """``axes`` names the axes, such as ``[B, T, H, K]``."""
    expected = axes.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(tensor.shape)}; pass {expected} dimensions")


def check_shape(name: str, tensor: Tensor, expected: tuple[object, ...], axes: str) -> None:
    """``expected`` holds one size per axis; None leaves an axis free."""
    if tensor.dim() != len(expected) or any(
        want is not None and size != want for size, want in zip(tensor.shape, expected, strict=True)
    ):
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(
            f"{name} must be {axes} = [{sizes}], got shape {tuple(tensor.shape)}; make its sizes agree with the others"
        )


def check_dtype(name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        names = ", ".join(dtype_name(dtype) for dtype in allowed)
        raise ValueError(
            f"{name} must have one of the dtypes {names}, got {dtype_name(tensor.dtype)}; convert it with .to()"
        )


def check_same_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} must lie on the device of {reference_name} ({reference.device}), got {tensor.device}; "
                f"move it with .to({str(reference.device)!r})"
            )


def check_range(name: str, value: int, low: int, high: int | None, hint: str) -> None:
    if value < low or (high is not None and value > high):
        rule = f"be at least {low}" if high is None else f"lie in [{low}, {high}]"
        raise ValueError(f"{name} must {rule}, got {value}; {hint}")
