"""Weights written in every way between calls: a layer answers as the three convolutions it stands for."""

import copy
import random

import hypothesis.strategies as st
import pytest
import torch
from fuzz.writes import WRITES, Three, by_gradient_steps, normal
from hypothesis import given
from torch import Tensor, nn

from kegfast.nn import TuckerConv2d

SHAPES = (
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "rank": (4, 6), "padding": 1},
    {"in_channels": 5, "out_channels": 7, "kernel_size": (3, 2), "rank": (3, 5), "stride": 2},
    {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "rank": (4, 4), "dilation": (1, 2)},
    {"in_channels": 16, "out_channels": 32, "kernel_size": 3, "rank": (16, 16), "padding": 1, "bias": False},
    {"in_channels": 3, "out_channels": 4, "kernel_size": 5, "rank": (2, 2), "padding": 2},
)
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
steps = st.one_of(
    st.tuples(st.sampled_from(WRITES), st.integers(0, 2**32)),
    st.tuples(st.sampled_from(sorted(MODES)), st.integers(0, 2**32)),
)


def compare(layer: nn.Module, three: nn.Module, mode: str, seed: int) -> None:
    """The same answers, three times each, and the same gradients."""
    draw = random.Random(seed)
    like = next(three.parameters()).detach()
    shape = (draw.choice((1, 2, 3)), three.first.in_channels, draw.choice((9, 10)), draw.choice((8, 9)))
    x = normal(draw, shape, like)
    if draw.random() < 0.3:
        x = x.to(memory_format=torch.channels_last)
    loose = 1e-9 if like.dtype == torch.float64 else 2e-4
    for _ in range(3):
        found, wanted = (outcome(model, x, mode) for model in (layer, three))
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            if not theirs.isfinite().all():
                return  # a filter of zeros has no direction that weight normalization could keep
            scale = float(theirs.abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose * max(scale, 1e-3))


@torch.no_grad()
def take_rounding(three: nn.Module, layer: nn.Module) -> None:
    """Gives the three convolutions the layer's weights, which gradients have moved alike but for rounding."""
    for theirs, ours in zip(three.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        theirs.copy_(ours)


def outcome(model: nn.Module, x: Tensor, mode: str) -> list[Tensor]:
    """What a model answers, with the gradients of all that asks for one."""
    with MODES[mode]():
        x = x.clone().requires_grad_(mode == "grad")
        y = model(x)
    if mode != "grad":
        return [y]
    wanted = [x, *(p for _, p in sorted(model.named_parameters()) if p.requires_grad)]
    grads = torch.autograd.grad(
        y, wanted, torch.cos(torch.arange(y.numel())).view_as(y).to(y), allow_unused=True
    )
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@given(steps=st.lists(steps, min_size=2, max_size=16), seed=st.integers(0, 2**32))
def test_a_layer_is_its_three_convolutions_however_its_weights_are_written(shape, steps, seed):
    torch.manual_seed(seed)
    layer = TuckerConv2d(**SHAPES[shape])
    three = Three(*(copy.deepcopy(part) for part in (layer.first, layer.core, layer.last)))
    compare(layer, three, "no_grad", seed)
    for what, number in steps:
        if isinstance(what, str):
            compare(layer, three, what, number)
        else:
            layer, three = (what(module, random.Random(number)) for module in (layer, three))
            if what is by_gradient_steps:
                take_rounding(three, layer)
            compare(layer, three, random.Random(number).choice(sorted(MODES)), number)
