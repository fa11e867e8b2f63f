"""Adapters, counters and model zoos that others publish, where they are installed."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kegfast
from kegfast.nn import TuckerConv2d

MACS, PARAMETERS, BIASES = 14 * 14 * (16 * 8 + 8 * 12 * 9 + 12 * 32), 1408, 14 * 14 * 32


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 16, 14, 14)


@pytest.fixture
def layer(x) -> TuckerConv2d:
    """A layer whose calls have settled."""
    layer = TuckerConv2d(16, 32, 3, (8, 12), padding=1)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    return layer


@pytest.mark.parametrize("targets", [["first"], ["core"], ["last"], ["first", "core", "last"]])
def test_low_rank_adapters_learn_and_merge(layer, x, targets) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=targets))
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    assert len(adapters) == len(targets)
    assert all(adapter.abs().max() > 0 for adapter in adapters)
    with torch.no_grad():
        want = model(x)
        merged = model.merge_and_unload()
        assert all(type(part) is nn.Conv2d for part in merged[0].children())
        for _ in range(3):
            torch.testing.assert_close(merged(x), want)


def test_thop_counts_three_convolutions(layer, x) -> None:
    thop = pytest.importorskip("thop")
    assert thop.profile(copy.deepcopy(layer), inputs=(x[:1],), verbose=False) == (MACS, PARAMETERS)


def test_torchinfo_counts_three_convolutions(layer, x) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    found = torchinfo.summary(layer, input_data=x[:1], verbose=0)
    assert (found.total_mult_adds, found.total_params) == (MACS + BIASES, PARAMETERS)


def test_ptflops_counts_three_convolutions(layer) -> None:
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    for backend in ("pytorch", "aten"):
        found = ptflops.get_model_complexity_info(layer, (16, 14, 14), backend=backend, **options)
        assert found in ((MACS + BIASES, PARAMETERS), (MACS, PARAMETERS))


LEFT = {"densenet121": 62}  # that stand before convolutions, not behind
FOLDED = "efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "hrnet_w18_small", "resnet18"


@pytest.mark.parametrize("name", [*LEFT, *FOLDED])
def test_timm_models_are_folded(name) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1), nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.1, 0.1)
    folded = kegfast.fuse(model)
    assert sum(isinstance(module, _BatchNorm) for module in folded.modules()) == LEFT.get(name, 0)
    with torch.no_grad():
        want = model(x)
        assert (folded(x) - want).abs().max() <= 1e-4 * want.abs().max()
