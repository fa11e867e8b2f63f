"""Whoever writes to a layer's weights, however: the next output is that of the bytes that are there."""

import copy

import numpy as np
import pytest
import torch
from needs import needs_native
from torch import nn
from tucker2_cases import settled, three_convolutions

import kegfast
from kegfast.dispatch import cpu
from kegfast.nn import TuckerConv2d

FACTORS = "first", "core", "last"


def agrees(layer: TuckerConv2d, x: torch.Tensor) -> None:
    want = three_convolutions(layer, x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-5)


def through_data(weight: nn.Parameter, index: tuple[int, ...]) -> None:
    weight.data[index] += 5


def through_numpy(weight: nn.Parameter, index: tuple[int, ...]) -> None:
    weight.detach().numpy()[index] += 5


def through_kept_versions(weight: nn.Parameter, index: tuple[int, ...]) -> None:
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
        weight[index] += 5


def through_dlpack(weight: nn.Parameter, index: tuple[int, ...]) -> None:
    torch.from_dlpack(weight.detach())[index] += 5


WRITES = [through_data, through_numpy, through_kept_versions, through_dlpack]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("factor", FACTORS)
def test_every_single_element_counts(factor: str, write) -> None:
    layer, x = settled()
    weight = getattr(layer, factor).weight
    indices = list(np.ndindex(*weight.shape))
    with torch.no_grad():
        before = layer(x)
        for index in indices[:: max(1, len(indices) // 40)] + indices[-1:]:
            kept = weight.detach().clone()
            write(weight, index)
            y = layer(x)
            assert not torch.equal(y, before)
            torch.testing.assert_close(y, three_convolutions(layer, x), atol=1e-4, rtol=1e-5)
            weight.data.copy_(kept)
            assert torch.equal(layer(x), before)


def prune_channels(layer: TuckerConv2d) -> None:
    layer.core.weight.data[:, 1::2] = 0


def scale_half(layer: TuckerConv2d) -> None:
    layer.first.weight.data[:, :3] *= 0.5


def keep_center_taps(layer: TuckerConv2d) -> None:
    center = layer.core.weight.data[:, :, 1, 1].clone()
    layer.core.weight.data.zero_()
    layer.core.weight.data[:, :, 1, 1] = center


def quantize(layer: TuckerConv2d) -> None:
    for name in FACTORS:
        weight = getattr(layer, name).weight
        weight.data = (weight.data * 16).round() / 16


def merge_an_adapter(layer: TuckerConv2d) -> None:
    weight = layer.last.weight.data
    weight += (torch.randn(20, 2) @ torch.randn(2, 17))[:, :, None, None]


def negate_the_view(layer: TuckerConv2d) -> None:
    """The same memory, the same bytes, read with the other sign."""
    layer.core.weight.data = torch._neg_view(layer.core.weight.data)


@pytest.mark.parametrize(
    "change",
    [prune_channels, scale_half, keep_center_taps, quantize, merge_an_adapter, negate_the_view],
)
def test_what_compression_code_writes(change) -> None:
    layer, x = settled()
    before = three_convolutions(layer, x)
    change(layer)
    assert not torch.allclose(three_convolutions(layer, x), before)
    agrees(layer, x)


def test_ablation_of_every_filter() -> None:
    torch.manual_seed(0)
    layer, x = TuckerConv2d(6, 64, 3, (4, 17), padding=1).eval(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
        for i in range(64):
            kept = layer.last.weight.data[i].clone()
            layer.last.weight.data[i] = 0
            y = layer(x)
            layer.last.weight.data[i] = kept
            torch.testing.assert_close(y[:, i], layer.last.bias[i].expand_as(y[:, i]))
            others = [k for k in range(64) if k != i]
            assert torch.equal(y[:, others], before[:, others])


@needs_native
@pytest.mark.parametrize("write", WRITES)
def test_reordered_weights_of_onednn_too(write) -> None:
    layer, x = settled()
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = layer.core.stride, layer.core.padding, layer.core.dilation
    shape = cpu.shape_of(x, layer.core.weight, 20, geometry)
    cpu.prefer(shape, "convolutions")
    try:
        with torch.no_grad():
            layer(x)
            assert kegfast.last_kernel() == "unfused"
            for index in ((0, 0, 0, 0), (3, 2, 1, 1), (16, 3, 2, 2)):
                write(layer.core.weight, index)
                torch.testing.assert_close(layer(x), three_convolutions(layer, x), atol=1e-4, rtol=1e-5)
    finally:
        cpu.prefer(shape, None)


@needs_native
def test_final_weights_are_not_compared() -> None:
    layer, x = settled()
    assert layer.final_() is layer
    agrees(layer, x)
    with torch.no_grad():
        before = layer(x)
        through_data(layer.core.weight, (3, 2, 1, 1))
        assert torch.equal(layer(x), before)  # the promise was broken
        layer.core.weight.mul_(2)  # torch counts this
    agrees(layer, x)
    layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()})
    agrees(layer, x)
    layer.last.weight = nn.Parameter(torch.randn_like(layer.last.weight))
    agrees(layer, x)
    layer.final_(False)
    agrees(layer, x)
    through_data(layer.core.weight, (3, 2, 1, 1))
    agrees(layer, x)


def test_copies_promise_nothing() -> None:
    layer, x = settled()
    other = copy.deepcopy(layer.final_())
    agrees(other, x)
    through_data(other.core.weight, (3, 2, 1, 1))
    agrees(other, x)


def test_final_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = settled()
        layer.final_()
        agrees(layer, x)
        layer.core.weight.mul_(2)  # counts no version
        agrees(layer, x)
