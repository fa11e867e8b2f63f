"""What takes long says what it is."""

import logging
import sys
import time

import pytest
import torch
from torch import nn

from kegfast import compress
from kegfast._util import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_only_what_takes_long_is_named(terminal, monkeypatch, caplog, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    caplog.set_level(logging.INFO, "kegfast")
    with progress.slow("short"):
        pass
    with progress.slow("long"):
        time.sleep(0.3)
        assert [record.getMessage() for record in caplog.records] == ["long ..."]  # before it ends
    assert capsys.readouterr().err.endswith("long ...\n") == terminal


def test_compress_names_the_layer(monkeypatch, caplog):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    caplog.set_level(logging.INFO, "kegfast")
    torch.manual_seed(0)
    compress(nn.Sequential(nn.Linear(300, 400)), budget={"params": 0.5})
    assert "factors of 0 (400 x 300) ..." in caplog.messages
    assert "errors of all layers at all ranks ..." in caplog.messages
