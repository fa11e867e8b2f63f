"""distill from the command line, behind train and compress."""

import json

import pytest
import torch
from cli_support import STUDENT, TRAIN, last_line, run

from kegfast._util.files import read_tensors
from kegfast.distillation.objective import TERMS


def test_compress_then_distill_then_evaluate(home, capsys):
    assert run(TRAIN) == 0
    compress = "compress --model nets:Net --weights a/model.safetensors --data mine.npz --evaluate"
    assert run(f"{compress} --rank net.0=2,3 -o s/student.safetensors") == 0
    report = json.loads((home / "s/student.json").read_text())
    ranks = {layer["name"]: layer["rank"] for layer in report["layers"]}
    assert ranks == {"net.0": [2, 3], "net.3": None}
    assert report["parameters"] < report["parameters_before"]
    assert (
        run(f"extract --data mine.npz {STUDENT.split(' --student')[0]} --steps 5 --generators 2 --out g") == 0
    )
    distill = f"distill --data mine.npz {STUDENT} --steps 20 --evaluate"
    for source in ("real", "gaussian uniform", "g/generators.safetensors", "real --pool 64"):
        assert run(f"{distill} --source {source} --out d") == 0
        results = json.loads((home / "d/results.json").read_text())
        assert results["before"] == report["accuracy"][1]
    losses = "soft_target+rkd_distance:25+rkd_angle:50+boundary"
    assert run(f"{distill} --source real --loss {losses} --out d") == 0
    results = json.loads((home / "d/results.json").read_text())
    assert {"soft_target", "rkd_distance", "rkd_angle"} < results.keys()
    student = read_tensors(home / "d/student.safetensors")[0]
    assert any(
        not torch.equal(student[name], t)
        for name, t in read_tensors(home / "s/student.safetensors")[0].items()
    )
    capsys.readouterr()
    # The file tells its structure: no --model.
    assert run("evaluate --data mine.npz --weights d/student.safetensors") == 0
    assert float(capsys.readouterr().out.split(" %")[0]) == pytest.approx(results["after"], abs=0.005)


def test_distill_resumes_to_the_same_result(home, monkeypatch, capsys):
    assert run(TRAIN) == 0
    assert (
        run("compress --model nets:Net --weights a/model.safetensors --rank 0.5 -o s/student.safetensors")
        == 0
    )
    distill = f"distill --data mine.npz {STUDENT} --steps 20 --source gaussian --batch-size 8"
    assert run(f"{distill} --out whole") == 0
    monkeypatch.setenv("CTRL_C_AT", "9")
    capsys.readouterr()
    assert run(f"{distill} --out d") == 130
    assert "stopped at step 9 of 20; go on with: kegfast distill" in last_line(capsys)
    monkeypatch.delenv("CTRL_C_AT")
    assert run("distill --out d --resume") == 0
    whole, resumed = (read_tensors(home / name / "student.safetensors")[0] for name in ("whole", "d"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_help_names_every_loss(capsys):
    assert run("distill --help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"names: {', '.join(TERMS)}" in text
