"""Factored layers are made, shown and reset as torch's own."""

import pytest
import torch
from torch import nn

from kegfast.nn import TuckerConv2d, TuckerLinear

LAYERS = {
    "conv": lambda **options: TuckerConv2d(6, 8, 3, (3, 4), (2, 1), (1, 2), (1, 2), **options),
    "linear": lambda **options: TuckerLinear(6, 8, (3, None), **options),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_parameters_are_made_where_and_in_the_dtype_that_is_asked_for(make):
    for device, dtype in (("cpu", torch.float64), ("meta", torch.bfloat16)):
        made = {(p.device.type, p.dtype) for p in make(device=device, dtype=dtype).parameters()}
        assert made == {(device, dtype)}
    with torch.device("meta"):
        assert all(p.is_meta for p in make().parameters())
    with pytest.raises(TypeError, match=r"^dtype must be a floating-point torch.dtype, got torch.int32"):
        make(dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^device must be one that this torch can use, got 'nowhere'"):
        make(device="nowhere")


def test_skip_init_takes_them():
    layer = nn.utils.skip_init(TuckerConv2d, 6, 8, 3, (3, 4), dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("cpu", torch.float64)}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_reset_draws_what_the_constructor_draws(make):
    torch.manual_seed(0)
    layer = make()
    fresh = {name: p.clone() for name, p in layer.state_dict().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    parts = [name for name, _ in layer.named_children()]
    torch.manual_seed(0)
    layer.reset_parameters()
    assert parts == [name for name in ("first", "core", "last") if getattr(layer, name) is not None]
    for name, parameter in layer.state_dict().items():
        assert torch.equal(parameter, fresh[name]), name


def test_sizes_are_attributes_and_stand_in_the_repr():
    layer = LAYERS["conv"](activation="relu")
    sizes = {"kernel_size": (3, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "rank": (3, 4)}
    assert (layer.in_channels, layer.out_channels) == (6, 8)
    assert {name: getattr(layer, name) for name in sizes} == sizes
    told = ", ".join(f"{name}={size}" for name, size in sizes.items())
    assert repr(layer).splitlines()[1].strip() == f"6, 8, {told}, bias=True, activation='relu'"
    assert "in_features=6, out_features=8, rank=(3, None), bias=True" in repr(LAYERS["linear"]())
    layer.core = nn.Identity()  # another tool's part, which has no sizes
    assert repr(layer).splitlines()[1].strip() == "activation='relu'"
