"""A network on a GPU as CUDA graphs: a call costs one launch, whatever its layers are."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kegfast._util.cuda_graph import Captured

MOST_GRAPHS = 8
"""Sizes of inputs whose graphs are kept, each with memory of its own."""


class Replayed(nn.Module):
    """Runs a network a few times as it is, for each size of its inputs, then records and replays it.

    Its weights are read where they lie: they may be written to, not put elsewhere.

    Args:
        network: on one GPU; it must not wait for the device.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._graphs: dict[tuple[Any, ...], Captured] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """What the network answers, in memory that no later call writes to."""
        key = tuple((x.device, x.dtype, x.shape, x.stride()) for x in inputs)
        if key not in self._graphs:
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = Captured(self.network)
        return tree_map_only(Tensor, Tensor.clone, self._graphs[key](*inputs))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": {}}
