"""Rounding weights so that the products, not the weights, keep what they were: GPTQ with scales of ours.

onnxruntime.quantization has a GPTQ too; packing its result, it computes scales anew and rounds once more.

Source: GPTQ (arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
DAMPING = 0.01  # of the mean of the diagonal: what the samples did not show stays solvable
PANEL = 128  # rows whose errors reach the rows behind them together


def gptq(
    weight: Floats, moments: Floats, block_size: int, bits: int = 4
) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Round a weight row by row, each row's error made up for by the rows behind it.

    Args:
        weight: ``[K, N]`` of a product x @ weight.
        moments: ``[K, K]``, the sum of outer products of the x that were seen.
        block_size: rows that share a scale and a zero point.
        bits: of an entry.

    Returns:
        levels ``[K, N]`` uint8 in [0, 2^bits), scales ``[ceil(K / block_size), N]`` and zero points of that shape, so
        that weight is about ``(levels - zero_points) * scales``.
    """
    rows, _ = weight.shape
    top = 2**bits - 1
    work, hessian = weight.astype(np.float64), moments.astype(np.float64)
    mean = float(np.trace(hessian)) / rows
    hessian[np.diag_indices(rows)] += DAMPING * mean if mean > 0 else 1.0
    # The inverse's upper Cholesky factor holds what a row's error asks of each row behind it.
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    levels: NDArray[np.uint8] = np.empty(weight.shape, np.uint8)
    blocks = -(-rows // block_size)
    scales, zero_points = np.empty((blocks, weight.shape[1])), np.empty((blocks, weight.shape[1]))
    for start in range(0, rows, PANEL):
        stop = min(start + PANEL, rows)
        errors = np.empty((stop - start, weight.shape[1]))
        for row in range(start, stop):
            block = row // block_size
            if row % block_size == 0:
                scales[block], zero_points[block] = _grid(work[row : row + block_size], top)
            scale, zero = scales[block], zero_points[block]
            chosen = np.clip(np.rint(work[row] / scale) + zero, 0, top)
            levels[row] = chosen
            error = (work[row] - (chosen - zero) * scale) / factor[row, row]
            errors[row - start] = error
            work[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], error)
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return levels, scales, zero_points.astype(np.uint8)


def _grid(block: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and zero point of each column: its range and zero."""
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    # float32, as the graph has it: levels are chosen on the very grid that is read.
    scale = ((high - low) / top).astype(np.float32).astype(np.float64)
    scale[scale == 0] = 1
    return scale, np.clip(np.rint(-low / scale), 0, top)
