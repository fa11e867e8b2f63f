"""Several teachers as one."""

import math

import pytest
import torch
from torch import nn

from kegfast.distillation import Ensemble


class Constant(nn.Module):
    """The same logits for every sample."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


MODELS = [[4.0, -1.0, 0.5], [0.0, 3.0, 1.0]]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_averaged_at_the_temperature(temperature):
    ensemble = Ensemble([Constant(m) for m in MODELS], weights=[3, 1], temperature=temperature).double()
    first, second = ((torch.tensor(m).double() / temperature).softmax(0) for m in MODELS)
    answer = (ensemble(torch.zeros(2, 5)) / temperature).softmax(dim=1)
    torch.testing.assert_close(answer, (0.75 * first + 0.25 * second).expand(2, 3))


def test_logits_are_averaged():
    ensemble = Ensemble([Constant(m) for m in MODELS], weights=[3, 1], average="logits").double()
    expected = torch.tensor([0.75 * a + 0.25 * b for a, b in zip(*MODELS, strict=True)]).double()
    torch.testing.assert_close(ensemble(torch.zeros(2, 5)), expected.expand(2, 3))


def test_one_model_answers_for_itself():
    answer = Ensemble([Constant(MODELS[0])])(torch.zeros(1, 5))
    torch.testing.assert_close(answer.softmax(1), torch.tensor([MODELS[0]]).double().softmax(1))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"models": []}, "models"),
        ({"models": [3]}, "models"),
        ({"weights": [1.0, math.inf]}, "weights"),
        ({"weights": [1.0]}, "weights"),
        ({"weights": [1.0, -1.0]}, "weights"),
        ({"average": "median"}, "average"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_arguments_are_named(options, argument):
    arguments = {"models": [Constant(m) for m in MODELS], **options}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        Ensemble(**arguments)
