"""Forward and backward of fixed shapes as one CUDA graph: a step costs the CPU one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class CapturedStep:
    """A function that runs forward and backward, captured and replayed.

    A training step launches some 60 kernels a block. A GPU that is done with them before the CPU has launched the next
    ones waits; the replay of a graph launches them all at once, and gives the bits that the function gives.

    Args:
        function: takes tensors, runs a backward and returns tensors. It must neither wait for the device nor depend on
            values in host memory. It runs twice here: to warm up, and to be captured.
        parameters: the leaves whose ``grad`` it fills. Their storages must stay: a replay reads and writes them.
        inputs: of the function, on one CUDA device; later calls take tensors of these shapes and dtypes.

    Raises:
        ValueError: an input that does not lie on a CUDA device.

    A call sets every gradient anew, it adds to none. Gradients and results lie in buffers that the next call
    overwrites.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], parameters: Iterable[Tensor], *inputs: Tensor
    ) -> None:
        for x in inputs:
            if not x.is_cuda:
                raise ValueError(f"inputs must lie on a CUDA device, got {x.device}; call the function itself there")
        self._parameters = list(parameters)
        self._inputs = [x.clone() for x in inputs]
        device = (*self._inputs, *self._parameters)[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._drop_gradients()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = function(*self._inputs)
        self._gradients = [p.grad for p in self._parameters]
        # The capture ran nothing: its gradients hold no numbers yet.
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results for ``inputs``.

        Raises:
            ValueError: shapes or dtypes other than those that were captured.
        """
        expected = [(tuple(x.shape), x.dtype) for x in self._inputs]
        if (found := [(tuple(x.shape), x.dtype) for x in inputs]) != expected:
            raise ValueError(f"inputs must have the captured shapes and dtypes {expected}, got {found}; capture anew")
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._results
