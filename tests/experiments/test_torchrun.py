"""`kegfast reproduce` as two processes of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

import small_reproduce
from kegfast.cli import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = (
    "--seeds 0 --recipe tucker-only,gaussian,kegnet --ranks paper --pool 256 --steps 30 "
    "--generator-steps 10 --generator-batch 16 --amp bf16 --protocol paper"
)


def torchrun(folder: Path, command: str) -> subprocess.CompletedProcess:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([*start, *command.split()], capture_output=True, text=True, env=environment)


def test_two_processes_write_one_table(tmp_path):
    done = torchrun(tmp_path, f"reproduce pendigits {OPTIONS} --out {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report in") == 1
    rows = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["method"] for row in rows] == ["tucker-only", "gaussian", "kegnet"]
    assert [row["samples"] for row in rows] == [0, 256 // 5, 256]
    assert not list((tmp_path / "run").glob("*.pt*"))


def test_other_commands_say_that_they_run_alone(tmp_path):
    done = torchrun(tmp_path, "info")
    assert done.returncode != 0
    assert "torchrun works with extract, distill, reproduce, not with info" in done.stderr
