"""Every function that runs for long takes the options of a run by the same names and defaults."""

import inspect

import pytest
import torch
from small_models import convolutional

import kegfast

RUNS = [kegfast.train, kegfast.extract, kegfast.distill]
OPTIONS = {
    "amp": False,
    "device": None,
    "seed": 0,
    "checkpoint": None,
    "resume": False,
    "metrics": None,
    "progress": False,
}


@pytest.mark.parametrize("run", RUNS)
def test_options_are_named_alike(run):
    known = inspect.signature(run).parameters
    assert {name: known[name].default for name in OPTIONS} == OPTIONS
    assert known["label"].default == run.__name__
    assert {"lr", "steps", "batch_size"} <= known.keys()


def test_a_path_may_be_text(tmp_path):
    path = str(tmp_path / "run.pt")
    options = {"num_classes": 3, "sample_shape": (1, 9, 9), "generators": 1, "steps": 2, "batch_size": 4}
    kegfast.extract(convolutional(4).eval(), checkpoint=path, **options)
    assert torch.load(path)["label"] == "extract"
