"""The table of `reproduce shrink`: cells computed once, of any network that is listed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kegfast import data
from kegfast.cli import main
from kegfast.data.splits import DataInfo, make_splits
from kegfast.experiments import networks, shrinking
from kegfast.experiments.networks import NETWORKS, Network, network
from kegfast.models import MLP
from kegfast.recovery import pace, teaching
from kegfast.recovery.samples import Amounts
from kegfast.training import evaluate


def rows_of_three_classes(root):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    samples = (random.normal(size=(400, 8)) + 2 * np.eye(8)[labels]).astype(np.float32)
    return make_splits(DataInfo("rows", 3, (8,)), (samples, labels))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    entry = Network(
        lambda: MLP(8, 3, units=24, depth=2), rows_of_three_classes, (2.0,), training={"steps": 60}
    )
    monkeypatch.setitem(NETWORKS, "small", entry)
    monkeypatch.setattr(pace, "amounts", lambda subject: Amounts(256, 0, 64, 64))
    monkeypatch.setattr(teaching, "TABULAR", replace(teaching.TABULAR, steps=20))


def command(out, *more):
    return ["reproduce", "shrink", "--networks", "small", "--seeds", "0", "--out", str(out), *more]


def test_cells_are_computed_once_and_make_a_table(tmp_path, monkeypatch, capsys):
    assert main(command(tmp_path, "--counts", "0,80", "--json", str(tmp_path / "rows.json"))) == 0
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert set(written["cells"]) == {"small/2x/0/0", "small/2x/80/0"}
    for row in written["rows"]:
        assert row["ratio"]["mean"] >= 2
        assert row["accuracy"]["mean"] > 60
        assert row["best"]["mean"] >= row["accuracy"]["mean"]
    assert "small" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cells.json",
        "rows.json",
        "small.safetensors",
    ]
    monkeypatch.setattr(shrinking, "_cell", lambda *args: pytest.fail("a cell was computed again"))
    assert main(command(tmp_path, "--counts", "0,80", "--resume")) == 0


def test_time_that_is_up_leaves_cells_for_later(tmp_path, capsys):
    assert main(command(tmp_path, "--budget-seconds", "0")) == 0
    assert "2 cells are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "oracle"], "recipe must be left out"),
        (["--networks", "none"], "network must be one of"),
    ],
)
def test_what_it_does_not_know_is_refused(more, message, tmp_path, capsys):
    assert main(command(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_published_weights_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="pretrained must be given"):
        network("lenet5-mnist").teacher(None, None, tmp_path / "teacher.safetensors")


def test_published_networks_are_as_accurate_as_published(data_root, shared):
    entry = network("resnet20-cifar")
    splits = entry.splits(data_root)
    assert splits.info is networks.CIFAR
    teacher = entry.teacher(splits, shared / "pretrained", None)
    few = data.splits.Samples(*(part[:500].numpy() for part in splits.test.tensors), splits.info)
    assert evaluate(teacher, few) > 75
