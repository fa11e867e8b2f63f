"""Text options of the command line."""

import json

import pytest
import torch

from kegfast import load
from kegfast.compression.command import compress_to_file, parse_budget, parse_example, parse_rank
from kegfast.models import LeNet5


def test_options():
    assert parse_rank("evbmf") == "evbmf"
    assert parse_rank("0.5") == 0.5
    assert parse_rank("8,16") == (8, 16)
    assert parse_rank("-,5") == (None, 5)
    assert parse_rank("conv2:3,4; conv*:energy=0.9") == {"conv2": (3, 4), "conv*": "energy=0.9"}
    assert parse_budget("params=0.4") == {"params": 0.4}
    assert parse_example("1,3,8,8").shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_rank, "svd"),
        (parse_rank, "8,x"),
        (parse_rank, "conv:"),
        (parse_budget, "params"),
        (parse_example, "1,x"),
    ],
)
def test_bad_text_is_named(parse, text):
    with pytest.raises(ValueError, match="must be"):
        parse(text)


def test_student_and_report_are_written(tmp_path):
    path = tmp_path / "runs/student.safetensors"
    student, report = compress_to_file(
        LeNet5(), path, budget="params=0.4", example="1,1,32,32", factory="kegfast.models:LeNet5"
    )
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(load(path)(x), student(x))
    written = json.loads(path.with_suffix(".report.json").read_text())
    assert written["parameters"] == report.parameters
