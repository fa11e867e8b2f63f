"""Small random data sets and networks in place of the paper's."""

from dataclasses import replace

import numpy as np
import pytest

from kegfast import data
from kegfast.data.splits import make_splits
from kegfast.experiments import tables
from kegfast.experiments.paper import PAPERS
from kegfast.models import MLP


def random_splits(info, n=120):
    random = np.random.default_rng(0)
    labels = random.integers(0, info.num_classes, n)
    shift = labels.reshape(-1, *[1] * len(info.sample_shape)) / 5
    samples = random.normal(size=(n, *info.sample_shape)) + shift
    samples = samples.astype(np.float32)
    return make_splits(info, (samples, labels), (samples[:50], labels[:50]))


@pytest.fixture
def make_data():
    """Random splits of a data set, from its info and a number of samples."""
    return random_splits


@pytest.fixture(autouse=True)
def small_page(monkeypatch):
    monkeypatch.setattr(tables, "SHOWN", 40)


@pytest.fixture
def fake_data(monkeypatch):
    """Small random sets in place of the real ones."""
    monkeypatch.setattr(data, "load", lambda name, root=None: random_splits(data.describe(name)))


@pytest.fixture
def table_paper(monkeypatch, fake_data):
    """PenDigits with a small teacher of few steps."""
    small = replace(PAPERS["pendigits"], build=lambda: MLP(16, 10, units=20, depth=2), training={"steps": 3})
    monkeypatch.setitem(PAPERS, "pendigits", small)
    return small
