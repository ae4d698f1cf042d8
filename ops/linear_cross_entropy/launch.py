"""Launches of the Triton kernel between the matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._kernel_variant import KernelVariant
from .._launch import KERNEL_DTYPES, Config, launch, next_power_of_2, pointer, variant
from .kernels import cross_entropy_kernel

CHUNK_ELEMENTS = 1 << 27
"""Logits that are made at once: 256 MiB in 16 bit, products large enough for the matrix units."""

TILE = 128
"""Rows of the products' tiles: chunks are whole ones where they are larger."""


def _config(vocabulary: int, grads: bool) -> Config:
    block_v = min(next_power_of_2(max(vocabulary, 16)), 4096)
    return Config({"V": vocabulary, "GRADS": int(grads), "BLOCK_V": block_v}, num_warps=8 if block_v == 4096 else 4)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, the sum in the dtype of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = x.shape[0], weight.shape[0]
    loss = torch.empty(tokens, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if grads else x.new_empty(0)
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if grads else x.new_empty(0)
    step = max(CHUNK_ELEMENTS // max(vocabulary, 1), 1)
    step -= step % TILE if step > TILE else 0
    config = _config(vocabulary, grads)
    for start in range(0, tokens, step):
        rows, labels = x[start : start + step], target[start : start + step]
        logits = rows @ weight.t()
        launch(cross_entropy_kernel, (rows.shape[0],), config, logits, labels, loss[start : start + step], ignore_index)
        if grads:
            torch.mm(logits, weight, out=dx[start : start + step])
            _add_product(dweight, logits.t(), rows)
    return loss.sum(), dx, dweight.to(weight.dtype)


def variants() -> Iterator[KernelVariant]:
    for vocabulary in (257, 32000, 151936):
        for dtype in KERNEL_DTYPES:
            for grads in (False, True):
                arguments = {"logits": pointer(dtype), "target": "*i64", "loss": "*fp32", "ignore_index": "i32"}
                quick = vocabulary == 32000 and grads and dtype == KERNEL_DTYPES[1]
                label = f"V={vocabulary} gradient={grads} {dtype}"
                yield variant(label, cross_entropy_kernel, arguments, _config(vocabulary, grads), quick)
