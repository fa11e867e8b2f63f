"""A rule that wrecks a network does not do so in silence."""

import warnings

import pytest
import torch

import kegfast
from kegfast.models import LeNet5


@pytest.fixture
def model() -> LeNet5:
    torch.manual_seed(0)
    return LeNet5().eval()


def test_the_default_rule_warns_of_what_it_loses(model):
    with pytest.warns(UserWarning, match="lose .* of their weights' energy.*kegfast.shrink"):
        _, report = kegfast.compress(model)
    assert any("energy" in note for note in report.notes)


def test_with_samples_the_outputs_themselves_are_measured(model):
    images = torch.randn(64, 1, 32, 32)
    with pytest.warns(UserWarning, match="outputs and answers change by"):
        kegfast.compress(model, "energy=0.2", calibration=images)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": "energy=0.999"},
        {"rank": "energy=0.999", "calibration": torch.randn(64, 1, 32, 32)},
        {"budget": {"params": 0.3}},
        {"rank": {"conv3": (1, 1)}},
    ],
)
def test_what_keeps_the_network_or_was_asked_for_is_not_warned_of(model, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kegfast.compress(model, **options)
