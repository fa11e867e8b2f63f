"""A layer's call as it is measured, form by form."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kegfast.ops._operands import Geometry


class LayerCall(NamedTuple):
    """One Tucker-2 layer and what it was called with."""

    layer: Callable[[Tensor], Tensor]
    x: Tensor  # (N, C, H, W)
    first: Tensor  # (R1, C, 1, 1)
    core: Tensor  # (R2, R1, kh, kw)
    last: Tensor  # (K, R2, 1, 1)
    geometry: Geometry
