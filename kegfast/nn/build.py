"""Layers made of the factors of a dense one's weight."""

import torch
from torch import nn

from kegfast.nn.factors import FactoredConv2d, Factors
from kegfast.nn.tucker import TuckerConv2d, TuckerLinear


class FactorChain(FactoredConv2d, nn.Sequential):
    """The plain convolutions of a factored one, run one after the other: first, core, last.

    It has the attributes of the dense one, as `kegfast.nn.TuckerConv2d` has.
    """


def build(module: nn.Conv2d | nn.Linear, factors: Factors) -> nn.Module:
    """The layer that computes what `module` computes, from factors of its weight.

    Returns:
        `TuckerConv2d` or `TuckerLinear` where they can express it. A convolution factored on one
        side only, of size 1x1, or with a padding that they do not know becomes a `FactorChain` of
        plain convolutions under the same names (first, core, last).
    """
    if isinstance(module, nn.Linear):
        layer = TuckerLinear(module.in_features, module.out_features, factors.rank, module.bias is not None)
    elif None not in factors.rank and _fits_tucker(module):
        layer = TuckerConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            factors.rank,
            module.stride,
            explicit_padding(module),
            module.dilation,
            bias=module.bias is not None,
        )
    else:
        layer = chain(module, factors)
    layer.to(module.weight.device, module.weight.dtype)
    with torch.no_grad():
        _fill(layer, module, factors)
    layer.requires_grad_(module.weight.requires_grad)
    return layer.train(module.training)


def _fits_tucker(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and explicit_padding(conv) is not None


def explicit_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The padding as two numbers; None where "same" pads the two sides of an axis unequally."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return conv.padding


def chain(conv: nn.Conv2d, factors: Factors) -> "FactorChain":
    """The plain convolutions of the factors, empty. 1x1 convolutions commute with any padding."""
    in_rank, out_rank = factors.rank
    inner, outer = in_rank or conv.in_channels, out_rank or conv.out_channels
    bias = conv.bias is not None
    # A 1x1 core may leave its stride to `first`, which then computes only the pixels that remain.
    early = in_rank is not None and conv.kernel_size == (1, 1) and explicit_padding(conv) == (0, 0)
    stride = conv.stride
    parts = FactorChain()
    if in_rank is not None:
        parts.first = nn.Conv2d(conv.in_channels, inner, 1, stride if early else 1, bias=False)
    parts.core = nn.Conv2d(
        inner,
        outer,
        conv.kernel_size,
        1 if early else stride,
        conv.padding,
        conv.dilation,
        bias=bias and out_rank is None,
        padding_mode=conv.padding_mode,
    )
    if out_rank is not None:
        parts.last = nn.Conv2d(outer, conv.out_channels, 1, bias=bias)
    return parts


def _fill(layer: nn.Module, module: nn.Conv2d | nn.Linear, factors: Factors) -> None:
    for name, factor in factors._asdict().items():
        if factor is not None:
            weight = getattr(layer, name).weight
            weight.copy_(factor.reshape(weight.shape))
    if module.bias is not None:
        (layer.core if factors.last is None else layer.last).bias.copy_(module.bias)
