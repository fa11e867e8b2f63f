"""The unfused form of a Tucker-2 layer on the CPU at its best: oneDNN's convolutions on reordered weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from kegfast.dispatch.packed import Weights, is_dense, watched
from kegfast.ops import _native, reference
from kegfast.ops.tucker2 import reads_channels_last


class PackedConvolutions:
    """Runs a layer's factors one after another, reordered once for x's shape: what a frozen graph does.

    For float32 in channels_last, outside autograd.

    They are reordered again whenever a factor's address, version, dtype, shape or strides change, or a
    sample of its numbers does (torch does not count writes through `.data`).

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        # key, samples, reordered factors, and the factors' memory, which keeps their addresses theirs
        self._kept: tuple[tuple[object, ...], tuple[int, ...], list[Tensor], tuple[Tensor, ...]]
        self._kept = (), (), [], ()

    def __call__(
        self, x: Tensor, weights: Weights, options: tuple, addend: Tensor | float | None = None
    ) -> Tensor | None:
        """The layer's output, or None where oneDNN does not take it. `options`: geometry and activation."""
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) or watched():
            return None
        if not (reads_channels_last(x) and is_dense(x)):  # of planes oneDNN makes channels_last
            return None
        *factors, bias = weights
        geometry = options[:3]
        try:
            key = x.shape, x.stride(), geometry, *(_key(w) for w in factors)
        except RuntimeError:  # inference tensors have no version
            return None
        samples = tuple(_native._C.sample_of(w.data_ptr(), w.numel()) for w in factors)
        kept = self._kept
        if key != kept[0] or samples != kept[1]:
            if not all(is_dense(w) and w.dtype is x.dtype for w in factors):
                return None
            factors = tuple(w.detach() for w in factors)
            kept = self._kept = key, samples, _reorder(x, factors, geometry), factors
        first, core, last = kept[2]
        z = _run(x, first, None, _POINTWISE)
        z = _run(z, core, None, geometry)
        if addend is not None:
            return reference.finish(_run(z, last, bias, _POINTWISE), addend, options[3])
        return _run(z, last, bias, _POINTWISE, "none" if options[3] is None else "relu")

    def __reduce__(self) -> tuple[Callable[[], "PackedConvolutions"], tuple[()]]:
        return PackedConvolutions, ()

    def __deepcopy__(self, memo: dict[int, object]) -> "PackedConvolutions":
        return PackedConvolutions()


_POINTWISE = (1, 1), (0, 0), (1, 1)  # stride, padding, dilation


def _key(w: Tensor) -> tuple[object, ...]:
    return w.data_ptr(), w._version, w.dtype, w.shape, w.stride()


def _reorder(x: Tensor, factors: tuple[Tensor, ...], geometry: tuple) -> list[Tensor]:
    packed, z = [], x
    for w, (stride, padding, dilation) in zip(factors, (_POINTWISE, geometry, _POINTWISE), strict=True):
        plain = w.contiguous().to_mkldnn()
        own = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, padding, stride, dilation, 1, z.shape)
        packed.append(own)
        z = _run(z, own, None, (stride, padding, dilation))
    return packed


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple, activation: str = "none") -> Tensor:
    stride, padding, dilation = geometry
    pointwise = torch.ops.mkldnn._convolution_pointwise.default
    return pointwise(x, weight, bias, padding, stride, dilation, 1, activation, [], "")
