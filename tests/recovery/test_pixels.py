"""The normalization of images: given, or found by what suits the network."""

import pytest
import torch
from torch import nn

from kegfast.extraction.procedural import Blobs, DeadLeaves
from kegfast.recovery.pixels import Pixels, find_pixels
from kegfast.recovery.subject import examine

SHAPE = (3, 16, 16)


def network(mean, std) -> nn.Module:
    """One whose BatchNorm has seen dead leaves, normalized so."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 14 * 14, 5),
    )  # fmt: skip
    pixels = Pixels(*(tuple(torch.tensor(part).expand(3).tolist()) for part in (mean, std)), "as given")
    with torch.no_grad():
        model(pixels.paint(DeadLeaves, SHAPE, torch.device("cpu")).sample(512)[0])
    return model.eval()


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        (0.0, 1.0, "[0, 1]"),
        (0.5, 0.5, "[-1, 1]"),
        (0.0, 1 / 255, "[0, 255]"),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet"),
    ],
)
def test_it_is_read_off_batchnorm(mean, std, name):
    found = find_pixels(examine(network(mean, std), SHAPE), None, None, None)
    assert name in found.origin
    assert found.guessed
    assert found.mean == pytest.approx(torch.tensor(mean).expand(3).tolist())


def test_without_batchnorm_it_is_one_that_makes_the_network_sure_of_several_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    found = find_pixels(examine(model, SHAPE), None, None, None)
    assert "surest" in found.origin


@pytest.mark.parametrize("kind", [DeadLeaves, Blobs])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.5), (0.2, 0.3)])
def test_images_lie_in_the_range_that_the_normalization_gives(kind, mean, std):
    pixels = Pixels((mean,) * 3, (std,) * 3, "as given")
    images = pixels.paint(kind, SHAPE, torch.device("cpu")).sample(64)[0]
    low, high = pixels.range
    assert (low, high) == pytest.approx((-mean / std, (1 - mean) / std))
    assert images.min() >= low - 1e-5
    assert images.max() <= high + 1e-5
    assert float(images.std()) > 0.1 * (high - low)


def test_batchnorm_that_knows_none_of_them_asks_for_it():
    with pytest.raises(ValueError, match="mean and std must be given"):
        find_pixels(examine(network(-40.0, 1e-3), SHAPE), None, None, None)


def test_a_range_stands_for_a_normalization():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    found = find_pixels(examine(model, SHAPE), None, None, (-1, 1))
    assert found.range == pytest.approx((-1, 1))
    assert not found.guessed
