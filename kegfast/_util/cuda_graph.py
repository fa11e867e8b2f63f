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
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        # Streams and graphs belong to a device: to that of the inputs, whichever is the current one.
        with torch.cuda.device(inputs[0].device):
            return self._call(inputs)

    def _call(self, inputs: tuple[Tensor, ...]) -> Any:
        self._calls += 1
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if self._calls <= WARM_UP:
            return self._aside(self._stream, inputs)
        if self._graph is None:
            self._inputs = [x.clone() for x in inputs]
            graph = torch.cuda.CUDAGraph()
            # The default stream of captures is the first device's that captured; other threads may allocate.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self.function(*self._inputs)
            self._graph = graph
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._graph.replay()
        return self._outputs

    def _aside(self, stream: torch.cuda.Stream, inputs: tuple[Tensor, ...]) -> Any:
        """The function on a stream of its own, as capture asks of warm-ups."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs
