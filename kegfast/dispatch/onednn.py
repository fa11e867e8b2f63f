"""The unfused form of a Tucker-2 layer on the CPU at its best: oneDNN's convolutions on reordered weights."""

import torch
from torch import Tensor

from kegfast.dispatch.packed import Copies, OwnMemory, Weights, copies_of, holds, is_dense
from kegfast.ops import reference
from kegfast.ops._operands import Geometry
from kegfast.ops.tucker2 import reads_channels_last

_POINTWISE = Geometry((1, 1), (0, 0), (1, 1))


def takes(x: Tensor, weights: Weights) -> bool:
    """Whether oneDNN runs such a call on reordered weights: dense pixels of one dtype, while it is on."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    # Of planes oneDNN makes channels_last itself.
    dense = reads_channels_last(x) and is_dense(x)
    return dense and all(is_dense(w) and w.dtype is x.dtype for w in weights[:3])


class PackedConvolutions(OwnMemory):
    """Runs a layer's factors one after another, reordered once for x's shape: what a frozen graph does.

    For what `takes` allows, outside autograd. They are reordered again whenever a byte of them changes.
    """

    def __init__(self) -> None:
        # key, the factors' bytes, reordered factors
        self._kept: tuple[tuple[object, ...], Copies | None, list[Tensor]] = (), None, []

    def __call__(
        self,
        x: Tensor,
        weights: Weights,
        geometry: Geometry,
        activation: str | None,
        addend: Tensor | float | None = None,
    ) -> Tensor:
        """The layer's output."""
        kept, key, bias = self._kept, (x.shape, x.stride(), geometry), weights[3]
        if key != kept[0] or not holds(kept[1], weights):
            copies = copies_of(weights)
            factors = weights[:3] if copies is None else copies
            kept = self._kept = key, copies, _reorder(x, factors, geometry)
        first, core, last = kept[2]
        z = _run(x, first, None, _POINTWISE)
        z = _run(z, core, None, geometry)
        if addend is not None:
            return reference.finish(_run(z, last, bias, _POINTWISE), addend, activation)
        return _run(z, last, bias, _POINTWISE, "none" if activation is None else "relu")


def _reorder(x: Tensor, factors: Copies, geometry: Geometry) -> list[Tensor]:
    packed, z = [], x
    for w, of in zip(factors, (_POINTWISE, geometry, _POINTWISE), strict=True):
        plain = w.contiguous().to_mkldnn()
        own = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            plain, of.padding, of.stride, of.dilation, 1, z.shape
        )
        packed.append(own)
        z = _run(z, own, None, of)
    return packed


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = "none"
) -> Tensor:
    stride, padding, dilation = geometry
    pointwise = torch.ops.mkldnn._convolution_pointwise.default
    return pointwise(x, weight, bias, padding, stride, dilation, 1, activation, [], "")
