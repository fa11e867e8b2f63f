"""Layers made of the factors of a dense one's weight."""

import torch
from torch import nn

from kegfast._util.modules import two
from kegfast.decomposition.factors import Factors
from kegfast.nn.factors import Dense, FactoredConv2d
from kegfast.nn.tucker import TuckerConv2d, TuckerLinear


class FactorChain(FactoredConv2d, nn.Sequential):
    """The plain convolutions of a factored one, run one after the other: first, core, last.

    It has the attributes of the dense one, as `kegfast.nn.TuckerConv2d` has.
    """


FactoredLayer = TuckerConv2d | TuckerLinear | FactorChain
"""What `build` makes."""


def build(module: Dense, factors: Factors) -> FactoredLayer:
    """The layer that computes what `module` computes, from factors of its weight.

    Returns:
        `TuckerConv2d` or `TuckerLinear` where they can express it. A convolution factored on one
        side only, of size 1x1, or with a padding that they do not know becomes a `FactorChain` of
        plain convolutions under the same names (first, core, last).
    """
    layer = _empty(module, factors)
    layer.to(module.weight.device, module.weight.dtype)
    with torch.no_grad():
        _fill(layer, module, factors)
    layer.requires_grad_(module.weight.requires_grad)
    return layer.train(module.training)


def _empty(module: Dense, factors: Factors) -> FactoredLayer:
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return TuckerLinear(module.in_features, module.out_features, factors.rank, bias)
    in_rank, out_rank = factors.rank
    padding = explicit_padding(module) if module.padding_mode == "zeros" else None
    if in_rank is None or out_rank is None or padding is None:
        return chain(module, factors)
    window, stride, dilation = two(module.kernel_size), two(module.stride), two(module.dilation)
    channels = module.in_channels, module.out_channels
    return TuckerConv2d(*channels, window, (in_rank, out_rank), stride, padding, dilation, bias)


def explicit_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The padding as two numbers; None where "same" pads the two sides of an axis unequally."""
    if not isinstance(conv.padding, str):
        return two(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def chain(conv: nn.Conv2d, factors: Factors) -> FactorChain:
    """The plain convolutions of the factors, empty. 1x1 convolutions commute with any padding."""
    in_rank, out_rank = factors.rank
    inner, outer = in_rank or conv.in_channels, out_rank or conv.out_channels
    bias = conv.bias is not None
    # A 1x1 core may leave its stride to `first`, which then computes only the pixels that remain.
    early = in_rank is not None and conv.kernel_size == (1, 1) and explicit_padding(conv) == (0, 0)
    stride, padding = two(conv.stride), conv.padding
    parts = FactorChain()
    if in_rank is not None:
        parts.first = nn.Conv2d(conv.in_channels, inner, 1, stride if early else 1, bias=False)
    parts.core = nn.Conv2d(
        inner,
        outer,
        two(conv.kernel_size),
        1 if early else stride,
        padding if isinstance(padding, str) else two(padding),
        two(conv.dilation),
        bias=bias and out_rank is None,
        padding_mode=conv.padding_mode,
    )
    if out_rank is not None:
        parts.last = nn.Conv2d(outer, conv.out_channels, 1, bias=bias)
    return parts


def _fill(layer: FactoredLayer, module: Dense, factors: Factors) -> None:
    for name, factor in factors._asdict().items():
        if factor is not None:
            weight = getattr(layer, name).weight
            weight.copy_(factor.reshape(weight.shape))
    if (bias := layer.bias) is not None and module.bias is not None:
        bias.copy_(module.bias)
