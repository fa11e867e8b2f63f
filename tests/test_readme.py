"""What the README shows runs: its code, and its commands as far as options go."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import kegfast
from kegfast.cli.app import make_parser
from kegfast.models import LeNet5

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
INDENTED = re.findall(r"^    (kegfast (?:.*\\\n)*.*)", README, re.MULTILINE)
COMMANDS = [*INDENTED, *re.findall(r"`(kegfast [^`]+)`", README)]


def shortened(code: str, **changes: str) -> str:
    for call, options in changes.items():
        code, found = re.subn(rf"({call}\(.*)\)", rf"\1, {options})", code)
        assert found == 1, f"the README calls {call} no longer"
    return code


def test_a_model_that_one_already_has():
    names = {"model": LeNet5()}
    few = "steps=2, batch_size=4"
    exec(shortened(CODE[0], extract=f"generators=1, {few}", distill=few), names)
    assert names["report"].ratio > 1
    assert names["generators"].sample(3)[0].shape == (3, 1, 32, 32)


def test_one_layer_and_the_loss_alone():
    names = {"conv": nn.Conv2d(32, 32, 3), "noises": torch.randn(8, 10), "samples": torch.randn(8, 3, 4, 4)}
    exec(CODE[1], names | {"kegfast": kegfast}, names)
    assert names["layer"].core.weight.shape == (16, 16, 3, 3)
    assert 0 < names["loss"].item() < 1


@pytest.mark.parametrize("command", [text for text in COMMANDS if "..." not in text])
def test_commands_have_the_options_that_they_show(command):
    words = shlex.split(command.replace("\\\n", " "))[1:]
    args = make_parser().parse_args(words)
    assert args.command == words[0]
