"""Functions and methods as steps: f(values, arguments, keyword arguments, node)."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from kegfast.freezing.network import Step
from kegfast.freezing.values import (
    MOST_TAPS,
    Unknown,
    Values,
    activation,
    adaptive_pooling,
    average_pooling,
    flattening,
    max_pooling,
    named,
    nothing,
    pairs,
    softmaxing,
)
from kegfast.ops.conv_max_pool import conv_max_pool2d


def _function(read: Callable[..., list[Step]], names: str, **defaults: Any) -> Callable[..., list[Step]]:
    """`read` of x and the arguments behind it by name."""

    def call(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
        if "input" in kwargs:
            args = [kwargs.pop("input"), *args]
        if not args:
            raise Unknown
        return read(values, args[0], *named(names, args[1:], kwargs, **defaults))

    return call


def _activating(kind: str) -> Callable[..., list[Step]]:
    read = activation(kind)
    return _function(lambda values, x, inplace: read(values, [x]), "inplace", inplace=False)


def _add(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    if len(args) != 2 or kwargs or values.known(args[0]) != values.known(args[1]):
        raise Unknown
    return [Step("add", args, [0])]


def _multiply(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    if len(args) != 2 or kwargs:
        raise Unknown
    left, right = values.known(args[0]), values.known(args[1])
    if len(left) != len(right) or left[:2] != right[:2]:
        raise Unknown
    if left == right or right[2:] == (1, 1):
        return [Step("multiply", args)]
    if left[2:] == (1, 1):
        return [Step("multiply", [args[1], args[0]])]
    raise Unknown


def _concatenate(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    tensors, dim = named("tensors dim", args, kwargs, dim=0)
    if not isinstance(tensors, tuple | list):
        raise Unknown
    shapes = [values.known(tensor) for tensor in tensors]
    if dim not in (1, 1 - len(shapes[0])) or len({(s[0], *s[2:]) for s in shapes}) > 1:
        raise Unknown
    return [Step("concatenate", list(tensors))]


def _mean(values: Values, x: Any, dim: Any, keepdim: Any, dtype: Any) -> list[Step]:
    values.images(x)
    axes = sorted(d % 4 for d in dim) if isinstance(dim, tuple | list) else []
    if axes != [2, 3] or dtype is not None:
        raise Unknown
    return [Step("adaptive_average", [x], [1, 1]) if keepdim else Step("mean", [x])]


def _view(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    """x.view(x.size(0), -1), in whatever words."""
    x, *sizes = args
    sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    shape = values.known(x)
    features = shape[1:].numel()
    keeps = (
        len(sizes) == 2 and sizes[1] in (-1, features) and (isinstance(sizes[0], fx.Node) or sizes[0] == -1)
    )
    if kwargs or not keeps or values.shapes[node] != (shape[0], features):
        raise Unknown
    return [Step("flatten", [x])] if len(shape) == 4 else []


def _subsample(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    """x[:, :, ::s, ::s]."""
    x, index = args
    values.images(x)
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(i, slice) for i in index):
        raise Unknown
    if any(i.start not in (None, 0) or i.stop is not None or not isinstance(i.step or 1, int) for i in index):
        raise Unknown
    steps = [i.step or 1 for i in index]
    if steps[:2] != [1, 1]:
        raise Unknown
    return [Step("place", [x], [*steps[2:], 0, 0, 0, 0, 0, 0])]


def _pad(values: Values, x: Any, pad: Any, mode: Any, value: Any) -> list[Step]:
    values.images(x)
    sides = [*pad, 0, 0, 0, 0][:6] if isinstance(pad, tuple | list) and len(pad) in (2, 4, 6) else [-1]
    if (
        mode != "constant"
        or value not in (None, 0, 0.0)
        or not all(isinstance(n, int) and n >= 0 for n in sides)
    ):
        raise Unknown
    left, right, top, bottom, front, back = sides
    return [Step("place", [x], [1, 1, front, back, top, bottom, left, right])]


def _conv_max_pool(values: Values, args: list[Any], kwargs: dict[str, Any], node: fx.Node) -> list[Step]:
    names = "x weight bias stride padding pool pool_stride pool_padding activation"
    defaults = {"bias": None, "stride": 1, "padding": 0, "pool": 2, "pool_stride": None, "pool_padding": 0}
    x, weight, bias, stride, padding, pool, pool_stride, pool_padding, follows = named(
        names, args, kwargs, **defaults, activation=None
    )
    values.images(x)
    window = values.parameter(weight)
    if window.shape[2] * window.shape[3] > MOST_TAPS:
        raise Unknown
    weights = [window, None if bias is None else values.parameter(bias)]
    pooled = pool if pool_stride is None else pool_stride
    options = pairs(stride, padding, pool, pooled, pool_padding)
    return [Step("conv_max_pool", [x], [*options, follows == "relu"], weights)]


_flatten = _function(flattening, "start_dim end_dim", start_dim=0, end_dim=-1)
_softmax = _function(
    lambda values, x, dim, _stacklevel, dtype: softmaxing(values, x, dim if dtype is None else None, False),
    "dim _stacklevel dtype", _stacklevel=3, dtype=None,
)  # fmt: skip
_log_softmax = _function(
    lambda values, x, dim, _stacklevel, dtype: softmaxing(values, x, dim if dtype is None else None, True),
    "dim _stacklevel dtype", _stacklevel=3, dtype=None,
)  # fmt: skip
_means = _function(_mean, "dim keepdim dtype", keepdim=False, dtype=None)
_max_pools = _function(
    max_pooling, "kernel_size stride padding dilation ceil_mode return_indices",
    stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
)  # fmt: skip
_average_pools = _function(
    average_pooling, "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
)  # fmt: skip
_dropout = _function(
    lambda values, x, p, training, inplace: nothing(values, [x]) if training is False else _refuse(),
    "p training inplace", p=0.5, training=True, inplace=False,
)  # fmt: skip


def _refuse() -> list[Step]:
    raise Unknown


FUNCTIONS: dict[Any, Callable[..., list[Step]]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    torch.cat: _concatenate,
    torch.concat: _concatenate,
    torch.flatten: _flatten,
    torch.mean: _means,
    operator.getitem: _subsample,
    F.pad: _function(_pad, "pad mode value", mode="constant", value=None),
    conv_max_pool2d: _conv_max_pool,
    F.max_pool2d: _max_pools,
    torch.max_pool2d: _max_pools,
    F.avg_pool2d: _average_pools,
    F.adaptive_avg_pool2d: _function(adaptive_pooling, "output_size"),
    F.softmax: _softmax,
    F.log_softmax: _log_softmax,
    torch.softmax: _function(
        lambda values, x, dim, dtype: softmaxing(values, x, dim if dtype is None else None, False),
        "dim dtype",
        dtype=None,
    ),
    torch.log_softmax: _function(
        lambda values, x, dim, dtype: softmaxing(values, x, dim if dtype is None else None, True),
        "dim dtype",
        dtype=None,
    ),
    F.dropout: _dropout,
    torch.relu: _activating("relu"),
    torch.relu_: _activating("relu"),
    F.relu: _activating("relu"),
    F.relu6: _activating("relu6"),
    F.silu: _activating("silu"),
    F.hardswish: _activating("hardswish"),
    F.hardsigmoid: _activating("hardsigmoid"),
    F.sigmoid: _activating("sigmoid"),
    torch.sigmoid: _activating("sigmoid"),
    F.tanh: _activating("tanh"),
    torch.tanh: _activating("tanh"),
}

METHODS: dict[str, Callable[..., list[Step]]] = {
    "add": _add,
    "add_": _add,
    "mul": _multiply,
    "mul_": _multiply,
    "flatten": _flatten,
    "mean": _means,
    "view": _view,
    "reshape": _view,
    "contiguous": _function(lambda values, x: nothing(values, [x]), ""),
    "relu": _activating("relu"),
    "relu_": _activating("relu"),
    "sigmoid": _activating("sigmoid"),
    "sigmoid_": _activating("sigmoid"),
    "tanh": _activating("tanh"),
    "tanh_": _activating("tanh"),
    "softmax": FUNCTIONS[torch.softmax],
    "log_softmax": FUNCTIONS[torch.log_softmax],
}
