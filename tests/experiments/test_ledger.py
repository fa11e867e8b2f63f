"""Results are computed once."""

import json

import pytest

from kegfast.experiments.ledger import Ledger, spread


def test_a_cell_is_computed_once_even_by_a_later_run(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"accuracy": 97.5}

    path = tmp_path / "run" / "results.json"
    for _ in range(2):
        ledger = Ledger(path, {"seeds": (0, 1)})
        assert ledger.cell("a", compute) == {"accuracy": 97.5}
    assert len(calls) == 1
    assert json.loads(path.read_text()) == {"config": {"seeds": [0, 1]}, "cells": {"a": {"accuracy": 97.5}}}


def test_an_error_leaves_the_earlier_cells(tmp_path):
    ledger = Ledger(tmp_path / "results.json", {})
    ledger.cell("a", lambda: 1)
    with pytest.raises(ZeroDivisionError):
        ledger.cell("b", lambda: 1 / 0)
    assert Ledger(tmp_path / "results.json", {}).cells == {"a": 1}


def test_another_configuration_and_other_files_are_refused(tmp_path):
    path = tmp_path / "results.json"
    Ledger(path, {"steps": 1}).cell("a", lambda: 1)
    with pytest.raises(ValueError, match=r"results\.json must be results of"):
        Ledger(path, {"steps": 2})
    for text in ("{", "[]", '{"config": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected an experiment's results"):
            Ledger(path, {})


def test_spread():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert spread([5.0]) == {"mean": 5.0, "std": 0.0, "n": 1}
