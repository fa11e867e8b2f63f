"""Factored layers have the attributes of the dense layers that they stand for: other code reads them."""

import pytest
import torch
from torch import nn

from kegfast import compress
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain

OPTIONS = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def fuse_as_detectors_do(conv, norm):
    """BatchNorm into a convolution, read by its attributes."""
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
    ).to(conv.weight.device, conv.weight.dtype)
    scale = norm.weight / torch.sqrt(norm.eps + norm.running_var)
    flat = conv.weight.view(conv.out_channels, -1)
    with torch.no_grad():
        fused.weight.copy_((scale[:, None] * flat).view(fused.weight.shape))
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
        fused.bias.copy_(norm.bias + (bias - norm.running_mean) * scale)
    return fused


def layers():
    """A Tucker-2 convolution, chains with and without a first part, and a strided 1x1."""
    torch.manual_seed(0)
    spatial = nn.Conv2d(6, 8, 3, **OPTIONS)
    yield nn.Sequential(spatial), (3, 4), TuckerConv2d
    yield nn.Sequential(nn.Conv2d(6, 8, 3, bias=False)), (None, 4), FactorChain
    yield nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")), (3, 4), FactorChain
    yield nn.Sequential(nn.Conv2d(6, 8, 1, stride=(2, 1))), (3, None), FactorChain


@pytest.mark.parametrize(("model", "rank", "kind"), list(layers()))
@torch.no_grad()
def test_code_for_convolutions_reads_them(model, rank, kind):
    dense, layer = model[0], compress(model, {"0": rank})[0][0]
    assert type(layer) is kind
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(dense, name), name
    assert layer.padding_mode == dense.padding_mode
    assert layer.rank == rank
    assert layer.weight.shape == dense.weight.shape
    assert layer.weight.dtype == dense.weight.dtype
    assert (layer.bias is None) == (dense.bias is None)
    norm = nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(fuse_as_detectors_do(layer, norm)(x), norm(layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [(3, 4), (3, None), (None, 4)])
def test_code_for_linears_reads_them(rank):
    torch.manual_seed(0)
    layer = compress(nn.Sequential(nn.Linear(6, 8)), {"0": rank})[0][0]
    assert type(layer) is TuckerLinear
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 8, rank)
    x = torch.randn(5, 6)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))


def test_the_weight_is_made_from_the_factors_as_they_are_and_written_by_nobody():
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 8, 3, (3, 4))
    names = list(layer.state_dict())
    before = layer.weight
    with torch.no_grad():
        layer.core.weight.mul_(2)
    torch.testing.assert_close(layer.weight, 2 * before)
    layer.weight.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in (layer.first.weight, layer.core.weight))
    for value in (before.detach(), nn.Parameter(before.detach())):
        with pytest.raises((AttributeError, KeyError), match="weight"):
            layer.weight = value
    assert list(layer.state_dict()) == names
