"""A convolution and the max pooling behind it as one operator."""

from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import register_fake
from torch.overrides import handle_torch_function, has_torch_function

from kegfast._util.check import expected
from kegfast._util.modules import two
from kegfast.ops import _native, reference
from kegfast.ops._flops import register_flop_formula
from kegfast.ops._operands import (
    Pair,
    autocast,
    autocasts,
    check_activation,
    check_operands,
    pair,
)
from kegfast.ops.tucker2 import reads_channels_last, tucker2_output_size

Two = tuple[int, int]
Windows = tuple[Two, Two, Two, Two, Two]  # stride, padding, pool, pool_stride, pool_padding
_MOST_ROWS = 256  # of the convolution's window, in the kernel


def conv_max_pool2d(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, kh, kw)
    bias: Tensor | None = None,  # (K,)
    stride: Pair = 1,
    padding: Pair = 0,
    pool: Pair = 2,
    pool_stride: Pair | None = None,
    pool_padding: Pair = 0,
    activation: Literal["relu"] | None = None,
) -> Tensor:  # (N, K, U, V)
    """The maximum over windows of a convolution, then the activation: a residual network's stem.

    One kernel on the CPU where nothing needs a gradient, torch's own operators otherwise. Half types are
    computed in float32 on the CPU, and rounded once. `kegfast.fuse` puts it into graphs.

    Args:
        x: (N, C, H, W) input.
        weight: (K, C, kh, kw) of the convolution, which has no groups and no dilation.
        bias: (K,), or None.
        stride, padding: of the convolution; an int or a (vertical, horizontal) pair.
        pool: the pooling's window.
        pool_stride: its stride, None for the window.
        pool_padding: its padding, at most half of the window.
        activation: None or "relu".

    Returns:
        (N, K, U, V) in x's dtype; in channels_last where x or the weight is.

    Raises:
        TypeError: for something other than floating-point tensors of one dtype.
        ValueError: for shapes, devices or geometry that do not fit together.
    """
    tensors = x, weight, bias
    if has_torch_function(tensors):  # torch.fx's proxies, subclasses with a __torch_function__
        return handle_torch_function(
            conv_max_pool2d, tensors, x, weight, bias, stride, padding, pool, pool_stride, pool_padding,
            activation,
        )  # fmt: skip
    shapes = stride, padding, pool, pool if pool_stride is None else pool_stride, pool_padding
    known = activation in (None, "relu") and all(t is None or isinstance(t, Tensor) for t in tensors)
    if known and not is_compiling() and not autocasts(x) and _fuses(*tensors):
        pairs = tuple(tuple(n) if isinstance(n, tuple | list) else (n, n) for n in shapes)
        try:
            return _run(tensors, pairs, activation)
        except (RuntimeError, TypeError, ValueError):
            # The operator's own refusal: say in words what is wrong with which argument. A small layer
            # computes for less than asking first takes.
            _check(*tensors, shapes, activation)
            raise
    geometry = _check(*tensors, shapes, activation)
    tensors = autocast(tensors)
    if not _fuses(*tensors):
        return reference.conv_max_pool2d(*tensors, *geometry, activation)
    return _run(tensors, geometry, activation)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, shapes: tuple[Pair, ...], activation: object
) -> Windows:
    """Raises what `conv_max_pool2d` documents; the geometry as pairs."""
    check_activation(activation)
    names = "stride", "padding", "pool", "pool_stride", "pool_padding"
    sizes = zip(names, shapes, (1, 0, 1, 1, 0), strict=True)
    stride, padding, pool, pool_stride, pool_padding = (pair(name, two, least) for name, two, least in sizes)
    geometry = stride, padding, pool, pool_stride, pool_padding
    _check_tensors(x, weight, bias)
    _check_windows(x, weight, geometry)
    return geometry


def _run(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    geometry: tuple[tuple[int, ...], ...],
    activation: str | None,
) -> Tensor:
    x, weight, bias = tensors
    if x.dtype is not torch.float32:
        wide = x.float(), weight.float(), None if bias is None else bias.float()
        return _run(wide, geometry, activation).to(x.dtype)
    (sh, sw), (ph, pw), *pool = geometry
    (kh, kw), (psh, psw), (pph, ppw) = pool
    channels_last = reads_channels_last(x) or reads_channels_last(tensors[1])
    return torch.ops.kegfast.conv_max_pool.default(
        *tensors, sh, sw, ph, pw, kh, kw, psh, psw, pph, ppw, activation == "relu", channels_last
    )


def _fuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernel takes this call."""
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    known = reference.computed_in(x) is torch.float32 and x.is_cpu and x.dim() == weight.dim() == 4
    known = known and weight.shape[2] <= _MOST_ROWS
    known = known and all(t is None or t.dtype is x.dtype for t in (weight, bias))
    return known and not training and _native.use_native()


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_operands(x, bias, weight=weight)
    if 0 in x.shape[1:]:
        raise ValueError(expected("x", "with something in its images", x))
    if 0 in weight.shape[2:]:
        raise ValueError(expected("weight", "with something in its window", weight))
    if weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(expected("weight", f"(K, {x.shape[1]}, kh, kw), x's channels", weight))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(expected("bias", f"({weight.shape[0]},), one per output channel", bias))


def _check_windows(x: Tensor, weight: Tensor, geometry: Windows) -> None:
    stride, padding, pool, _, pool_padding = geometry
    if any(2 * p > k for k, p in zip(pool, pool_padding, strict=True)):
        raise ValueError(expected("pool_padding", "at most half of the pool", pool_padding))
    size = tucker2_output_size(x.shape[2], x.shape[3], weight, stride, padding, (1, 1))
    if any(n < 1 or n + 2 * p < k for n, p, k in zip(size, pool_padding, pool, strict=True)):
        raise ValueError(expected("x", "at least as large as both windows", x))


def _sizes(
    x_shape: tuple[int, ...],
    weight: Tensor,  # (K, C, kh, kw)
    ints: tuple[int, ...],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(P, Q) of the convolution and (U, V) of the pooling."""
    stride, padding, pool, pool_stride, pool_padding = (two(ints[i : i + 2]) for i in range(0, 10, 2))
    conv = tucker2_output_size(x_shape[2], x_shape[3], weight, stride, padding, (1, 1))
    windows = zip(conv, pool, pool_stride, pool_padding, strict=True)
    rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in windows)
    return conv, (rows, columns)


def _register() -> None:
    def fake(x, weight, bias, *rest):
        *ints, _, channels_last = rest
        _, (u, v) = _sizes(x.shape, weight, ints)
        n, k = x.shape[0], weight.shape[0]
        return x.new_empty((n, u, v, k)).permute(0, 3, 1, 2) if channels_last else x.new_empty((n, k, u, v))

    def flops(x_shape, weight_shape, bias_shape, *rest, out_shape=None, **kwargs) -> int:
        weight = torch.empty(weight_shape, device="meta")
        (p, q), _ = _sizes(x_shape, weight, rest[:-2])
        return 2 * x_shape[0] * p * q * weight.numel()

    register_fake("kegfast::conv_max_pool", fake)
    register_flop_formula(torch.ops.kegfast.conv_max_pool, flops)


if _native._C is not None:
    _register()
