"""shrink from the command line: a user's network, from its weights to a student and a page."""

import json
from dataclasses import replace

import pytest
import torch
from cli_support import TRAIN, last_line, run

import kegfast
from kegfast.recovery import samples, teaching

SHRINK = "shrink --model nets:Net --weights a/model.safetensors --sample-shape 6 --ratio 1.3 --out s"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr("kegfast.recovery.pace.amounts", lambda subject: samples.Amounts(256, 0, 64, 64))
    monkeypatch.setattr(teaching, "TABULAR", replace(teaching.TABULAR, steps=20))


def test_one_line_from_weights_to_a_student(home, capsys):
    assert run(TRAIN) == 0
    capsys.readouterr()
    assert run(f"{SHRINK} -o small/student.safetensors") == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "student in small/student.safetensors" in out
    assert "<html" in (home / "s/report.html").read_text()
    results = json.loads((home / "s/results.json").read_text())
    assert results["ratio"] >= 1.3
    assert results["chosen"] in [one["name"] for one in results["candidates"]]
    own, copied = (
        kegfast.load(home / name) for name in ("s/student.safetensors", "small/student.safetensors")
    )
    x = torch.randn(5, 6)
    torch.testing.assert_close(own(x), copied(x))


def test_real_samples_and_accuracies(home, capsys):
    assert run(TRAIN) == 0
    command = SHRINK.replace("--sample-shape 6", "--data mine.npz --source real --evaluate")
    assert run(command) == 0
    results = json.loads((home / "s/results.json").read_text())
    assert "data" in results["decisions"]
    assert len(results["accuracy"]) == 2
    assert "test accuracy" in capsys.readouterr().out


def test_it_resumes_to_the_same_student(home, monkeypatch, capsys):
    assert run(TRAIN) == 0
    assert run(SHRINK.replace("--out s", "--out whole")) == 0
    monkeypatch.setenv("CTRL_C_AT", "9")
    capsys.readouterr()
    assert run(SHRINK) == 130
    assert "go on with: kegfast shrink" in last_line(capsys)
    monkeypatch.delenv("CTRL_C_AT")
    assert run("shrink --out s --resume") == 0
    whole, resumed = (kegfast.load(home / name / "student.safetensors") for name in ("whole", "s"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratio 0.5", "ratio must be"),
        ("--ratio 100", "ratio must be at most"),
        ("--ratio 2 --budget params=0.5", "ratio must be left out"),
        ("--sample-shape 7", "sample_shape must be"),
        ("--mean 0.5 --std 0.5", "mean must be left out"),
        ("--num-classes 4", "num_classes must be 3"),
        ("--source real", "source real needs --data"),
        ("--model nets:Pair", "model must be"),
    ],
)
def test_what_it_does_not_take_is_said_in_one_line(options, message, home, capsys):
    assert run(TRAIN) == 0
    capsys.readouterr()
    assert run(f"{SHRINK.replace(' --ratio 1.3', '')} {options}") == 2
    assert message in last_line(capsys)
    assert not (home / "s").exists()
