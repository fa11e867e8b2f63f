"""The budget of random cases is kept, shared and accounted for."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = """
import hypothesis.strategies as st
import pytest
from hypothesis import given

@given(n=st.integers(0, 1000))
def test_drawn(n, tmp_path):
    with open("drawn", "a") as file:
        print(n, file=file)

@pytest.mark.parametrize("kind", ["a", "b"])
def test_looped(seeds, kind):
    for seed in seeds(3):
        with open(kind, "a") as file:
            print(seed, file=file)

@given(n=st.integers(0, 1000))
def test_wrong(n):
    assert n < 900
"""


def run(folder: Path, **variables: str) -> str:
    """What pytest says of the tests above."""
    (folder / "test_cases.py").write_text(TESTS)
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."]
    known = {k: v for k, v in os.environ.items() if not k.startswith("KEGFAST_FUZZ")}
    done = subprocess.run(command, cwd=folder, env=known | variables, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    return done.stdout


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_the_ordinary_suite_draws_few_cases_and_always_the_same(tmp_path):
    run(tmp_path)
    assert lines(tmp_path / "a") == lines(tmp_path / "b") == ["0", "1", "2"]
    first = lines(tmp_path / "drawn")
    assert len(first) == 25
    run(tmp_path)
    assert lines(tmp_path / "drawn") == first + first


def test_a_budget_is_spent_by_all_tests_and_counted(tmp_path):
    start = time.monotonic()
    said = run(tmp_path, KEGFAST_FUZZ_SECONDS="2", KEGFAST_FUZZ_SEED="7")
    assert 1.5 < time.monotonic() - start < 30  # the last test fails at once
    assert "seed 7" in said
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) cases", said)]
    drawn, looped = lines(tmp_path / "drawn"), lines(tmp_path / "a")
    assert counts[:3] == [len(drawn), len(looped), len(lines(tmp_path / "b"))]
    assert counts[-1] == sum(counts[:-1])
    assert len(drawn) > 50
    assert looped == [str(7 + i) for i in range(len(looped))]
    assert "n=900" in said  # what was shrunk to
