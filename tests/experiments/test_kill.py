"""`kegfast reproduce`, killed at any moment again and again, ends with the table of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path

import small_reproduce
from kegfast.cli import main

def newest(folder):
    found = 0
    for path in folder.rglob("*"):
        try:
            found = max(found, path.stat().st_mtime_ns)
        except FileNotFoundError:
            pass
    return found

def start(folder):
    child = os.fork()
    if child == 0:
        os._exit(main([*sys.argv[2:], "--out", str(folder)]))
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

draw, home = random.Random(0), Path(sys.argv[1])
assert end(start(home / "whole")) == 0
codes = []
while len(codes) < 40 and codes.count(-signal.SIGKILL) < 6 and 0 not in codes:
    before = newest(home / "parts")
    child = start(home / "parts")
    while newest(home / "parts") == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 0.4))
    os.kill(child, signal.SIGKILL)
    codes.append(end(child))
assert end(start(home / "parts")) == 0
print(codes.count(-signal.SIGKILL))
"""
OPTIONS = "reproduce pendigits --ranks paper --generator-steps 40 --generator-batch 32 --resume "


@pytest.mark.parametrize(
    "options",
    [
        "--seeds 0 --recipe tucker-only,gaussian,kegnet,oracle --pool 256 --steps 150",
        "--seeds 0 --recipe tucker-only,gaussian,uniform,kegnet --pool 640 --steps 400 --protocol paper",
    ],
    ids=["equal", "paper"],
)
def test_a_run_that_is_killed_many_times_ends_with_the_same_table(options, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *OPTIONS.split(), *options.split()]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    # A fork must not inherit a pool of threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3, done.stdout
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")]
    for row in (row for rows in found for row in rows):
        del row["seconds"]
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert not list((tmp_path / "parts").glob("*.pt"))
