"""Runs killed at random moments and resumed end with the bytes of an undisturbed run."""

import json
import os

from fuzz.interpreter import python


def test_killed_runs_end_with_the_same_bytes(tmp_path, seeds, share):
    kills = 25 if os.environ.get("KEGFAST_FUZZ_SECONDS") else 2
    for seed in seeds(1):
        done = python("-m", "fuzz.runs", str(tmp_path / str(seed)), str(seed), str(kills))
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        share.cases += sum(run["kills"] for run in found) - 1
        assert [run["kind"] for run in found] == ["train", "extract", "distill", "shrink"]
        assert all(run["same"] for run in found), (found, done.stderr)
        assert sum(run["kills"] for run in found) >= len(found), found
