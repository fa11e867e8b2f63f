"""Two models and a source, for the tests of the loop."""

import pytest
from small_models import perceptron
from torch import nn

from kegfast.distillation import GaussianNoise


@pytest.fixture
def teacher() -> nn.Sequential:
    return perceptron(8, 32, 4, seed=1)


@pytest.fixture
def student() -> nn.Sequential:
    return perceptron(8, 16, 4, seed=2)


@pytest.fixture
def noise() -> GaussianNoise:
    return GaussianNoise((8,))
