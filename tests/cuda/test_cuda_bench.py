"""The CUDA benchmark itself: a cell that fails, for whatever reason, costs itself alone. Needs no GPU."""

import sys

import pytest
import torch

from benchmarks import bench_cuda, cuda_cells
from benchmarks.bench_cuda import Job

GOOD = {"operator": "it", "times": {"kegfast": {"eager": 0.001}}}


def fails(error):
    def run():
        raise error

    return run


def test_a_wrong_cell_is_a_row_and_the_others_go_on():
    jobs = [
        Job("a", "first", 1, lambda: dict(GOOD)),
        Job("b", "wrong", 1, fails(AssertionError("wrong results"))),
        Job("c", "broken", 1, fails(RuntimeError("an illegal memory access"))),
        Job("d", "large", 1, fails(torch.OutOfMemoryError("too large"))),
        Job("e", "long", 1e9, lambda: dict(GOOD)),
        Job("f", "last", 1, lambda: dict(GOOD)),
    ]
    kept = []
    rows, left_out = bench_cuda.run_jobs(jobs, 60, lambda name, row: kept.append((name, row)))
    assert [row["name"] for row in rows] == ["first", "wrong", "broken", "last"]
    assert [row.get("error") for row in rows] == [
        None, "AssertionError: wrong results", "RuntimeError: an illegal memory access", None,
    ]  # fmt: skip
    assert left_out == ["large (too large)", "long"]
    assert kept == [(row["name"], row) for row in rows]


def test_a_cell_is_kept_before_the_next_begins():
    kept = []
    jobs = [
        Job("a", "first", 1, lambda: dict(GOOD)),
        Job("b", "killed", 1, fails(KeyboardInterrupt())),
    ]
    with pytest.raises(KeyboardInterrupt):
        bench_cuda.run_jobs(jobs, 60, lambda name, row: kept.append(name))
    assert kept == ["first"]


@pytest.mark.parametrize("end", ["raise SystemExit(1)", "os.abort()", "time.sleep(100)"])
@pytest.mark.parametrize("bad", [(), ("stages",), ("fused", "persistent")])
def test_a_form_that_fails_is_left_out_and_the_others_are_known_to_work(bad, end):
    program = f"""
import os, sys, time
for name in sys.argv[1:]:
    if name in {bad}:
        {end}
    print(name, flush=True)
"""
    found = cuda_cells.broken_forms([sys.executable, "-c", program], seconds=1)
    assert found == list(bad)
