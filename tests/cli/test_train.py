"""train and evaluate from the command line: results, Ctrl-C, resuming."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from cli_support import TRAIN, last_line, run, run_process

from kegfast._util.files import read_state_dict


def test_train_then_evaluate(home, capsys):
    assert run(f"{TRAIN} --epochs 20".replace("--steps 30", "")) == 0
    results = json.loads((home / "a/results.json").read_text())
    assert results["accuracy"]["test"] > 80
    assert results["steps"] == 20 * (140 // 20)
    steps = [json.loads(line)["step"] for line in (home / "a/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 141, 10))
    capsys.readouterr()
    assert run("evaluate --data mine.npz --model nets:Net --weights a/model.safetensors") == 0
    accuracy = float(capsys.readouterr().out.split(" %")[0])
    assert accuracy == pytest.approx(results["accuracy"]["test"], abs=0.005)


def test_published_teacher_from_the_command_line(shared, capsys):
    weights = shared / "pretrained/kegnet/mnist.pth.tar"
    assert run(f"evaluate --data mnist --root {shared}/data --model lenet5 --weights {weights}") == 0
    assert capsys.readouterr().out == "98.91 % of 10000 samples (mnist, test)\n"


def test_ctrl_c_says_how_to_go_on_to_the_same_result(home, monkeypatch, capsys):
    assert run(TRAIN.replace("--out a", "--out whole")) == 0
    monkeypatch.setenv("CTRL_C_AT", "17")
    capsys.readouterr()
    assert run(TRAIN) == 130
    line = last_line(capsys)
    assert line == f"kegfast train: train stopped at step 17 of 30; go on with: kegfast {TRAIN} --resume"
    assert not (home / "a/model.safetensors").exists()
    monkeypatch.delenv("CTRL_C_AT")
    assert run("train --out a --resume") == 0  # its options are in the folder
    whole, resumed = (read_state_dict(home / name / "model.safetensors") for name in ("whole", "a"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (home / "a/results.json").read_text() == (home / "whole/results.json").read_text()


def test_a_process_that_ctrl_c_stops_ends_with_130(home):
    done = run_process(
        TRAIN, env=os.environ | {"CTRL_C_AT": "5"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("--resume\n")


def test_resume_refuses_other_options(home, capsys):
    assert run(TRAIN) == 0
    capsys.readouterr()
    assert run("train --out a --resume --lr 0.5") == 2
    assert last_line(capsys) == "kegfast train: --lr was None in the run to resume, got 0.5"


def test_an_error_before_the_first_step_leaves_an_older_run_alone(home):
    assert run(TRAIN) == 0
    before = {path.name: path.read_bytes() for path in (home / "a").iterdir()}
    assert run(f"{TRAIN} --batch-size -1") == 2
    assert {path.name: path.read_bytes() for path in (home / "a").iterdir()} == before


def test_a_run_without_a_seed_of_its_own_repeats_itself(home):
    for out in ("x", "y"):
        assert run(TRAIN.replace("--out a", f"--out {out}")) == 0
    assert run(TRAIN.replace("--out a", "--out z --seed 1")) == 0
    x, y, z = (read_state_dict(home / out / "model.safetensors")["net.0.weight"] for out in "xyz")
    assert torch.equal(x, y)
    assert not torch.equal(x, z)


def test_a_full_disk_is_one_line_and_leaves_the_old_files(home):
    assert run(TRAIN) == 0
    before = {path.name: path.read_bytes() for path in (home / "a").iterdir()}
    # A limit on the size of files fails as a full disk does: in the middle of writing.
    script = f"""
import resource, sys
from kegfast.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))
sys.exit(main({shlex.split(TRAIN)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"kegfast train: {home}/a/checkpoint.pt: File too large\n"
    assert {path.name: path.read_bytes() for path in (home / "a").iterdir()} == before
