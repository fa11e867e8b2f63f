"""What layers and calls of a graph are read with: the shapes of its values, and readings that both share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from kegfast._util.graph import target_name
from kegfast.freezing.network import ACTIVATIONS, Step

MOST_TAPS = 256  # of a window, in the kernels

Shapes = Mapping[fx.Node, torch.Size]
"""Of the float32 tensors among a graph's values, for the example input."""


class Unknown(Exception):
    """A node that torch has to run."""


class Values:
    """The values of a graph."""

    def __init__(self, graph: fx.GraphModule, shapes: Shapes):
        self.modules: dict[str, nn.Module] = dict(graph.named_modules(remove_duplicate=False))
        self.shapes = shapes
        self.batch = next(iter(shapes.values()))[0] if shapes else 0

    def images(self, value: Any) -> torch.Size:
        """The shape of a value, which must be (N, C, H, W)."""
        return self._shape(value, 4)

    def vectors(self, value: Any) -> torch.Size:
        """The shape of a value, which must be (N, C)."""
        return self._shape(value, 2)

    def known(self, value: Any) -> torch.Size:
        """The shape of a value of either kind."""
        return self._shape(value, 2, 4)

    def _shape(self, value: Any, *dimensions: int) -> torch.Size:
        shape = self.shapes.get(value) if isinstance(value, fx.Node) else None
        if shape is None or len(shape) not in dimensions or shape[0] != self.batch or 0 in shape:
            raise Unknown
        return shape

    def parameter(self, node: Any) -> Tensor:
        """The tensor that a node gets."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise Unknown
        owner, _, name = target_name(node).rpartition(".")
        tensor = getattr(self.modules[owner], name)
        if tensor.dtype is not torch.float32:
            raise Unknown
        return tensor


def pairs(*values: Any) -> list[int]:
    """Both numbers of each value, which is an int for both or has two."""
    numbers: list[Any] = []
    for value in values:
        two = list(value) if isinstance(value, tuple | list) else [value, value]
        numbers += two * 2 if len(two) == 1 else two
    if len(numbers) != 2 * len(values) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise Unknown
    return numbers


def named(names: str, args: list[Any], kwargs: Mapping[str, Any], **defaults: Any) -> list[Any]:
    """Arguments behind x in the order of their names."""
    order = names.split()
    if len(args) > len(order) or not set(kwargs) <= set(order) or set(order[: len(args)]) & set(kwargs):
        raise Unknown
    given = defaults | dict(zip(order, args, strict=False)) | dict(kwargs)
    if any(name not in given for name in order):
        raise Unknown
    return [given[name] for name in order]


def nothing(values: Values, args: list[Any], *_: Any) -> list[Step]:
    values.known(args[0])
    return []


def activation(kind: str) -> Callable[..., list[Step]]:
    def read(values: Values, args: list[Any], *_: Any) -> list[Step]:
        values.known(args[0])
        return [Step("activation", [args[0]], [ACTIVATIONS.index(kind)])]

    return read


def max_pooling(
    values: Values, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: Any, indices: Any
) -> list[Step]:
    values.images(x)
    if indices is not False:
        raise Unknown
    options = pairs(kernel, stride or kernel, padding, dilation)
    return [Step("max_pool", [x], [*options, bool(ceil)])]


def average_pooling(
    values: Values, x: Any, kernel: Any, stride: Any, padding: Any, ceil: Any, count: Any, divisor: Any
) -> list[Step]:
    values.images(x)
    options = pairs(kernel, stride or kernel, padding)
    if divisor is not None and divisor <= 0:
        raise Unknown
    return [Step("average_pool", [x], [*options, bool(ceil), bool(count), divisor or 0])]


def adaptive_pooling(values: Values, x: Any, size: Any) -> list[Step]:
    height, width = values.images(x)[2:]
    two = list(size) if isinstance(size, tuple | list) else [size, size]
    two = [side if n is None else n for n, side in zip(two, (height, width), strict=True)]
    return [Step("adaptive_average", [x], pairs(two))]


def flattening(values: Values, x: Any, start: Any, end: Any) -> list[Step]:
    shape = values.known(x)
    if start != 1 or end not in (-1, len(shape) - 1):
        raise Unknown
    return [Step("flatten", [x])] if len(shape) == 4 else []


def softmaxing(values: Values, x: Any, dim: Any, logarithm: bool) -> list[Step]:
    values.vectors(x)
    if dim not in (1, -1):
        raise Unknown
    return [Step("softmax", [x], [int(logarithm)])]
