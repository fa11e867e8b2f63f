"""The paper's networks: their published weights load and are as accurate as published."""

import pytest
import torch

from kegfast._util.files import load_weights
from kegfast.data import load
from kegfast.models import MLP, LeNet5, ResNet14
from kegfast.training import evaluate

PUBLISHED = [
    pytest.param("mnist", "mnist", LeNet5, 98.91, id="mnist"),
    pytest.param("fashion", "fashion-mnist", ResNet14, 92.50, id="fashion"),
]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (LeNet5(), 61_706),
        (ResNet14(1, 10), 172_682),
        (ResNet14(3, 10), 172_970),
        (MLP(9, 7), 102_707),
    ],
    ids=["LeNet5", "ResNet14-1", "ResNet14-3", "MLP"],
)
def test_parameter_counts(model, count):
    assert parameters(model) == count


@pytest.mark.parametrize(
    ("model", "shape", "classes"),
    [
        (LeNet5(3, 7), (3, 32, 32), 7),
        (ResNet14(2, 5), (2, 32, 32), 5),
        (ResNet14(1, 5), (1, 17, 23), 5),
        (MLP(4, 3, units=6, depth=2, dropout=0.5), (4,), 3),
    ],
)
def test_logits_and_gradients(seeded, model, shape, classes):
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def test_the_shortcut_subsamples_and_appends_zeros(seeded):
    block = ResNet14().layers2[0]
    x = torch.randn(2, 16, 6, 6)
    y = block.shortcut(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 3, 3)
    assert not y[:, 16:].any()


def test_published_svhn_weights_load(shared):
    load_weights(ResNet14(3, 10), shared / "pretrained/kegnet/svhn.pth.tar")


@pytest.mark.parametrize(("weights", "data", "network", "accuracy"), PUBLISHED)
def test_published_teachers_reach_their_accuracy(shared, data_root, weights, data, network, accuracy):
    model = load_weights(network(), shared / f"pretrained/kegnet/{weights}.pth.tar")
    assert evaluate(model, load(data, data_root).test) == pytest.approx(accuracy, abs=0.005)
