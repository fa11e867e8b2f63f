"""Whatever stands in the place of nn.Conv2d and nn.Linear is called as they are: by position or by name."""

import inspect

import pytest
import torch
from torch import Tensor, nn

import kegfast
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain

DENSE = {TuckerConv2d: nn.Conv2d, FactorChain: nn.Conv2d, TuckerLinear: nn.Linear}


class ByName(nn.Module):
    """Calls its layers with the arguments' names, as code written for torch's layers may."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.pointwise, self.linear = nn.Conv2d(16, 12, 1), nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(input=self.conv(input=x)).relu()
        return self.linear(input=self.pointwise(input=y).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return ByName().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", DENSE, ids=lambda layer: layer.__name__)
def test_parameters_begin_as_those_of_the_dense_layer(layer) -> None:
    theirs = list(inspect.signature(DENSE[layer].forward).parameters.values())
    ours = list(inspect.signature(layer.forward).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


def test_every_layer_that_compress_makes(model, x) -> None:
    student, _ = kegfast.compress(model, rank=0.5)
    made = {type(module) for module in student.modules()}
    assert set(DENSE) <= made
    for module in student.modules():
        if type(module) in DENSE:
            z = x if isinstance(module, TuckerConv2d) else torch.randn(4, 16, 5, 5)
            z = torch.randn(4, 12) if isinstance(module, TuckerLinear) else z
            assert torch.equal(module(input=z), module(z))
    with torch.no_grad():
        for _ in range(3):
            assert student(x).shape == (4, 9)


@pytest.mark.parametrize("work", ["compress", "fuse", "freeze", "autotune"])
def test_whatever_follows_a_model_that_calls_by_name(model, x, work, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path))
    student, _ = kegfast.compress(model, rank=0.5)
    with torch.no_grad():
        want = student(x)
    if work == "compress":
        found, _ = kegfast.compress(model, budget={"params": 0.9}, example_input=x, calibration=x)
        assert found(x).shape == want.shape
        return
    if work == "autotune":
        assert not kegfast.build_info()["native"] or kegfast.autotune(student, x)
        found = student
    else:
        if work == "freeze" and not kegfast.build_info()["native"]:
            pytest.skip("kegfast's compiled part is not built")
        found = getattr(kegfast, work)(student, x)
    with torch.no_grad():
        torch.testing.assert_close(found(x), want, rtol=1e-4, atol=1e-5)
