"""A user's folder for the tests of the command line."""

import signal
import sys

import numpy as np
import pytest
from cli_support import MODELS


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty current folder with a user's model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    samples = rng.normal(size=(200, 6)) + 3 * np.eye(6)[labels]
    np.savez("mine.npz", samples=samples, labels=labels)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as on a terminal; a background job's tests would start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
