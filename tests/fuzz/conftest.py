"""Random cases: few and always the same in the ordinary suite, else as many as a budget of seconds holds.

`KEGFAST_FUZZ_SECONDS` is the budget of the whole run. What is left of it when a test starts is shared evenly
among the tests still to come. A test here is either a hypothesis test, which is run again and again with new
seeds, or one that takes `seeds` and loops over it:

    def test_something(seeds):
        for seed in seeds(3):  # 3 in the ordinary suite
            ...

`KEGFAST_FUZZ_SEED` repeats a run: the seed that it drew stands above its counts.
"""

import functools
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hypothesis
import pytest

SECONDS = float(os.environ.get("KEGFAST_FUZZ_SECONDS") or 0)
SEED = int(os.environ.get("KEGFAST_FUZZ_SEED") or secrets.randbits(32)) if SECONDS else 0
SLACK = 300  # seconds beyond the budget before a test counts as hanging

hypothesis.settings.register_profile(
    "kegfast",
    max_examples=25,  # in a run by budget, before the test looks at the clock again
    derandomize=not SECONDS,
    deadline=None,
    database=None,
    print_blob=bool(SECONDS),
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("kegfast")


class Share:
    """One test's part of the budget, and the count of its cases."""

    def __init__(self, seconds: float):
        self.start = time.monotonic()
        self.seconds = seconds
        self.cases = 0

    def spent(self) -> float:
        return time.monotonic() - self.start

    def rounds(self, ordinary: int) -> Iterator[int]:
        """Seeds: `ordinary` of them without a budget, else one and more until the share is spent."""
        for number in itertools.count():
            if number and self.spent() > self.seconds if SECONDS else number >= ordinary:
                return
            yield SEED + number

    def seeds(self, ordinary: int) -> Iterator[int]:
        """`rounds` of one case each."""
        for seed in self.rounds(ordinary):
            self.cases += 1
            yield seed

    @contextmanager
    def counting(self, test: Callable) -> Iterator[None]:
        """Counts the examples of a hypothesis test."""
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            self.cases += 1
            return inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        yield
        test.hypothesis.inner_test = inner


class Budget:
    """The whole run's seconds, from its first test on."""

    def __init__(self, tests: int):
        self.tests = tests
        self.end: float | None = None

    def share(self) -> Share:
        now = time.monotonic()
        self.end = self.end or now + SECONDS
        share = Share(max(0.0, self.end - now) / max(1, self.tests))
        self.tests -= 1
        return share


BUDGET = pytest.StashKey[Budget]()
SHARE = pytest.StashKey[Share]()


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    config.stash[BUDGET] = Budget(len(ours))
    if SECONDS:
        for item in ours:
            item.add_marker(pytest.mark.timeout(SECONDS + SLACK))


@pytest.fixture(autouse=True)
def share(request) -> Share:
    """This test's share of the budget."""
    request.node.stash[SHARE] = request.config.stash[BUDGET].share()
    return request.node.stash[SHARE]


@pytest.fixture
def seeds(share) -> Callable[[int], Iterator[int]]:
    """`seeds(n)`: n different ints in the ordinary suite, else new ones until the test's share is spent."""
    return share.seeds


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a hypothesis test once, or again and again with other seeds; notes how many cases there were."""
    test, share = pyfuncitem.obj, pyfuncitem.stash[SHARE]
    drawn = getattr(test, "is_hypothesis_test", False)

    def repeated(**fixtures):
        for seed in share.rounds(1):
            (hypothesis.seed(seed)(test) if SECONDS else test)(**fixtures)

    if drawn:
        pyfuncitem.obj = repeated
    with share.counting(test) if drawn else nullcontext():
        yield
    pyfuncitem.obj = test
    pyfuncitem.user_properties.append(("fuzz", (share.cases, share.spent())))


def pytest_terminal_summary(terminalreporter):
    """How many cases each test had."""
    if not SECONDS:
        return
    terminalreporter.section(f"fuzz: seed {SEED}")
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = [
        (r.nodeid, *dict(r.user_properties)["fuzz"]) for r in reports if "fuzz" in dict(r.user_properties)
    ]
    for name, cases, seconds in found:
        terminalreporter.write_line(f"{cases:9,} cases in {seconds:7.1f} s: {name}")
    terminalreporter.write_line(f"{sum(cases for _, cases, _ in found):9,} cases")
