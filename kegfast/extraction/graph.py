"""A function of CUDA tensors as one CUDA graph: a step costs one launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls that run as they are, so that every library has made its choices and allocated what it keeps."""


class Captured:
    """Runs a function a few times, then records it and replays the record.

    What the function changes, it must change in place; shapes must stay. Its results are overwritten
    by the next call.

    Args:
        function: Of tensors on one GPU; it must not wait for the device.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(inputs)
        if self._graph is None:
            self._inputs = [x.clone() for x in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self.function(*self._inputs)
            self._graph = graph
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._graph.replay()
        return self._outputs

    def _aside(self, inputs: tuple[Tensor, ...]) -> Any:
        """The function on a stream of its own, as capture asks of warm-ups."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs
