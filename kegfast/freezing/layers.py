"""Modules as steps: f(values, arguments, module)."""

from collections.abc import Callable
from typing import Any

from torch import nn

from kegfast.extraction.moments import running_statistics
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
    nothing,
    softmaxing,
)
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain, explicit_padding


def _conv(values: Values, args: list[Any], conv: nn.Conv2d) -> list[Step]:
    (x,) = args
    values.images(x)
    padding = explicit_padding(conv)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    if padding is None or conv.padding_mode != "zeros" or taps > MOST_TAPS:
        raise Unknown
    options = [*conv.stride, *padding, *conv.dilation, conv.groups, 0, 0]
    return [Step("convolution", [x], options, [conv.weight, conv.bias])]


def _tucker(values: Values, args: list[Any], layer: TuckerConv2d) -> list[Step]:
    for value in args:
        values.images(value)
    core = layer.core
    padding = explicit_padding(core)
    if padding is None or core.kernel_size[0] * core.kernel_size[1] > MOST_TAPS:
        raise Unknown
    options = [*core.stride, *padding, *core.dilation, layer.activation == "relu"]
    weights = [layer.first.weight, core.weight, layer.last.weight, layer.last.bias]
    return [Step("tucker2", args, options, weights)]


def _linear(values: Values, args: list[Any], layer: nn.Linear) -> list[Step]:
    (x,) = args
    values.vectors(x)
    return [Step("linear", [x], [0], [layer.weight, layer.bias])]


def _tucker_linear(values: Values, args: list[Any], layer: TuckerLinear) -> list[Step]:
    parts = (layer.first, layer.core, layer.last)
    return [step for part in parts if part is not None for step in _linear(values, args, part)]


def _chain(values: Values, args: list[Any], layer: FactorChain) -> list[Step]:
    return [step for part in layer._parts for step in _conv(values, args, part)]


def _norm(values: Values, args: list[Any], norm: nn.BatchNorm2d | nn.BatchNorm1d) -> list[Step]:
    (x,) = args
    values.known(x)
    if norm.running_mean is None or norm.training:
        raise Unknown
    mean, variance = running_statistics(norm)
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return [Step("affine", [x], [0], [scale, shift])]


def _max_pool(values: Values, args: list[Any], pool: nn.MaxPool2d) -> list[Step]:
    options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    return max_pooling(values, args[0], *options)


def _average_pool(values: Values, args: list[Any], pool: nn.AvgPool2d) -> list[Step]:
    options = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad
    return average_pooling(values, args[0], *options, pool.divisor_override)


def _adaptive_module(values: Values, args: list[Any], pool: nn.AdaptiveAvgPool2d) -> list[Step]:
    return adaptive_pooling(values, args[0], pool.output_size)


def _flatten_module(values: Values, args: list[Any], layer: nn.Flatten) -> list[Step]:
    return flattening(values, args[0], layer.start_dim, layer.end_dim)


def _softmax_module(logarithm: bool) -> Callable[..., list[Step]]:
    return lambda values, args, layer: softmaxing(values, args[0], layer.dim, logarithm)


MODULES: dict[type, Callable[..., list[Step]]] = {
    nn.Conv2d: _conv,
    TuckerConv2d: _tucker,
    nn.Linear: _linear,
    TuckerLinear: _tucker_linear,
    FactorChain: _chain,
    nn.BatchNorm2d: _norm,
    nn.BatchNorm1d: _norm,
    nn.Identity: nothing,
    nn.Dropout: nothing,
    nn.Dropout2d: nothing,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_module,
    nn.Flatten: _flatten_module,
    nn.Softmax: _softmax_module(False),
    nn.LogSoftmax: _softmax_module(True),
    nn.ReLU: activation("relu"),
    nn.SiLU: activation("silu"),
    nn.Hardswish: activation("hardswish"),
    nn.Sigmoid: activation("sigmoid"),
    nn.Tanh: activation("tanh"),
    nn.Hardsigmoid: activation("hardsigmoid"),
    nn.ReLU6: activation("relu6"),
}
