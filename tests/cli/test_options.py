"""Options that may be spelled in more than one way."""

import pytest

from kegfast.cli import main
from kegfast.cli.app import make_parser


@pytest.mark.parametrize(
    ("options", "amp"), [("", False), ("--amp", True), ("--amp bf16", True), ("--amp --no-amp", False)]
)
def test_amp_may_name_its_type(options, amp):
    command = f"distill --weights w --student s --source real {options} --out o"
    assert make_parser().parse_args(command.split()).amp is amp


def test_amp_of_another_type_is_refused(capsys):
    assert main(["extract", "--weights", "w", "--amp", "fp16"]) == 2
    assert "must be bf16 or left out, got 'fp16'" in capsys.readouterr().err


def test_reproduce_takes_the_folder_of_data_by_either_name():
    for option in ("--data", "--root"):
        assert make_parser().parse_args(["reproduce", "mnist", option, "here"]).root.name == "here"
