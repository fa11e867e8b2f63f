"""What several tests of compression need."""

import sys
from pathlib import Path

import pytest
import torch

from kegfast import load_weights
from kegfast.models import LeNet5, ResNet14

sys.path.insert(0, str(Path(__file__).parent))  # for `odd`, which also stands for a user's own package


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models: more threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def teachers(shared):
    """The published teachers by data set."""
    models = {"mnist": LeNet5(), "fashion": ResNet14(), "svhn": ResNet14(3)}
    folder = shared / "pretrained/kegnet"
    return {name: load_weights(m, folder / f"{name}.pth.tar").eval() for name, m in models.items()}
