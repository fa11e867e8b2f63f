"""What the tests of the command line share: a user's own networks, and ways to run commands."""

import shlex
import subprocess
import sys

from kegfast.cli import main

MODELS = """
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    '''Sends Ctrl-C to its own process at call CTRL_C_AT.'''
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == int(os.environ.get("CTRL_C_AT", -1)):
            os.kill(os.getpid(), signal.SIGINT)
        return self.net(x)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

def double():
    return Net().double()

def broken():
    raise RuntimeError("broken inside")

def number():
    return 3
"""


TRAIN = "train --data mine.npz --model nets:Net --steps 30 --batch-size 20 --out a"


STUDENT = "--model nets:Net --weights a/model.safetensors --student s/student.safetensors"


def run(command: str) -> int:
    return main(shlex.split(command))


def run_process(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kegfast", *shlex.split(command)], capture_output=True, text=True, **options
    )


def last_line(capsys) -> str:
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.strip()
