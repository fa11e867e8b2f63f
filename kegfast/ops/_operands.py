"""Checks of convolutions' operands, which raise what the functions of `kegfast.functional` document."""

from typing import NamedTuple, Self, TypeGuard, overload

import torch
from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast._util.modules import two
from kegfast.ops.tucker2 import tucker2_output_size

Pair = int | tuple[int, int]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # x, first, core, last, bias
_FURTHEST = 2**24  # of strides, paddings and dilations: sizes of images must not overflow 64 bits
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Geometry(NamedTuple):
    """Of a convolution, each (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """That of a module; ValueError where its padding is by a name."""
        if isinstance(conv.padding, str):
            raise ValueError(expected("padding", "a pair of ints", conv.padding))
        return cls(two(conv.stride), two(conv.padding), two(conv.dilation))


def is_dense_float(x: object) -> TypeGuard[Tensor]:
    """Whether the operators compute with it: no tensor that is sparse, quantized or of 8 bits."""
    return isinstance(x, Tensor) and x.dtype in _FLOATS and x.layout is torch.strided


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """An int or a (vertical, horizontal) pair as a pair; ValueError unless in [least, `_FURTHEST`]."""
    two = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(two) != 2 or not all(isinstance(n, int | torch.SymInt) and least <= n <= _FURTHEST for n in two):
        what = f"an int or a pair of ints, each from {least} to {_FURTHEST}"
        raise ValueError(expected(name, what, value))
    return two


def check_activation(activation: object) -> None:
    """Raises ValueError for another than None and "relu"."""
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(expected("activation", "None or 'relu'", activation))


def check_operands(x: Tensor, bias: Tensor | None, **weights: Tensor) -> None:
    """Raises unless a convolution's input, weights and bias are dense floats, alike in device and dtype.

    Where the weights agree among themselves, it is x that is named.
    """
    own = [t for t in (*weights.values(), bias) if isinstance(t, Tensor)]
    if is_dense_float(x) and all(map(is_dense_float, own)):
        (device, *others), dtypes = {t.device for t in own}, {t.dtype for t in own}
        if not others and device != x.device:
            raise ValueError(expected("x", f"on the weights' device, {device}", x))
        if len(dtypes) == 1 and x.dtype not in dtypes and not autocasts(x):
            raise TypeError(expected("x", f"of the weights' dtype, {own[0].dtype}", x))
    for name, t in {"x": x, **weights, "bias": bias}.items():
        if t is None and name == "bias":
            continue
        if not is_dense_float(t):
            raise TypeError(expected(name, "a floating-point tensor", t))
        if t.device != x.device:
            raise ValueError(expected(name, f"on x's device, {x.device}", t))
        if t.dtype != x.dtype and not autocasts(x):
            raise TypeError(expected(name, f"of x's dtype, {x.dtype}", t))
        if name != "bias" and t.dim() != 4:
            raise ValueError(expected(name, "4-dimensional", t))


def check_tucker2(operands: Operands, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """Raises ValueError or TypeError for what `tucker_conv2d` cannot take; the geometry as pairs."""
    x, first, core, last, bias = operands
    check_operands(x, bias, first=first, core=core, last=last)
    if first.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(expected("first", f"(R1, {x.shape[1]}, 1, 1), x's channels", first))
    if core.shape[1] != first.shape[0] or 0 in core.shape:
        raise ValueError(expected("core", f"(R2, {first.shape[0]}, kh, kw), first's rank", core))
    if last.shape[1:] != (core.shape[0], 1, 1) or last.shape[0] == 0:
        raise ValueError(expected("last", f"(K, {core.shape[0]}, 1, 1), core's rank", last))
    if bias is not None and bias.shape != last.shape[:1]:
        raise ValueError(expected("bias", f"({last.shape[0]},), one per output channel", bias))
    geometry = Geometry(pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1))
    reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(core.shape[2:], *geometry[1:], strict=True)]
    if x.shape[2] < reach[0] or x.shape[3] < reach[1] or x.shape[2] == 0 or x.shape[3] == 0:
        what = f"at least {max(reach[0], 1)} x {max(reach[1], 1)} pixels, the core's window"
        raise ValueError(expected("x", what, x))
    return geometry


def tucker2_size(x: Tensor, core: Tensor, last: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    """(N, K, H', W') of the output."""
    height, width = x.shape[2:]
    return (x.shape[0], last.shape[0], *tucker2_output_size(height, width, core, *geometry))


def check_addend(addend: object, size: tuple[int, ...], device: torch.device) -> None:
    """Raises unless it is None, or adds to an output of this size without making it larger."""
    if addend is None or isinstance(addend, int | float):
        return
    if not isinstance(addend, Tensor) or addend.layout is not torch.strided:
        raise TypeError(expected("addend", "a dense tensor or a number", addend))
    sizes = zip(reversed(addend.shape), reversed(size), strict=False)
    if (addend.dim() and addend.device != device) or any(a != b and 1 not in (a, b) for a, b in sizes):
        what = f"on {device} and of a shape that adds to {tuple(map(int, size))}"
        raise ValueError(expected("addend", what, addend))


def check_in_memory(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor whose storage was resized to less than its numbers."""
    for name, t in tensors.items():
        if t is None or t.numel() == 0:
            continue
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        if (t.storage_offset() + last + 1) * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(expected(name, "a tensor whose storage holds its numbers", t))


def autocasts(x: Tensor) -> bool:
    """Whether torch casts the operands of convolutions on x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@overload
def autocast(operands: Operands) -> Operands: ...


@overload
def autocast(operands: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]: ...


def autocast(operands: tuple[Tensor, *tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """A convolution's operands, x first, in autocast's dtype where it is on, as torch's own take them."""
    x = operands[0]
    if not autocasts(x) or x.dtype == torch.float64:
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None else t.to(dtype) for t in operands)
