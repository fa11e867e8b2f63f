"""How many samples and steps: as many as pay, or as many as the time allows."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kegfast._util.files import read_json, write_json
from kegfast.compression.matching import STEPS as MATCHING
from kegfast.extraction.familiar import STEPS as MOVING
from kegfast.recovery.samples import Amounts, amounts
from kegfast.recovery.subject import Subject
from kegfast.recovery.teaching import Lesson, lessons
from kegfast.training.loop import seeded

SPENT = 0.6
"""Of the time goes to samples and steps, the rest to factors, judging and the report."""
TIMED = 32
"""Samples of a batch whose passes are timed."""
STEP = 1.5
"""A step of teaching takes so many passes forward and back: the teacher's forward one is the rest."""
SMALL = 8
"""Batches become smaller where there are less than 1 / `SMALL` of the usual steps."""
LEAST = 16
"""Samples or steps, of whatever there are any."""


@dataclass(frozen=True)
class Pace:
    """How much of everything.

    Attributes:
        amounts: of samples.
        lessons: of the student, one after another from the start.
        share: of what is usual, 1 where no time was set.
    """

    amounts: Amounts
    lessons: tuple[Lesson, ...]
    share: float = 1.0

    def write(self, path: Path, run: Mapping[str, Any]) -> None:
        """Writes it as that of a run, which `run` tells from others."""
        write_json(path, {"run": dict(run), **asdict(self)})

    @staticmethod
    def read(path: Path, run: Mapping[str, Any]) -> "Pace":
        """What `write` wrote.

        Raises:
            ValueError: it is another file, or that of another run.
        """
        found = read_json(path)
        for name, value in run.items():
            before = found.get("run", {}).get(name)
            if before != value:
                raise ValueError(f"{name} was {before} in the run to resume, got {value}")
        try:
            plans = tuple(Lesson(**plan) for plan in found["lessons"])
            return Pace(Amounts(**found["amounts"]), plans, found["share"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the plan of a run, got another file") from error


def usual(subject: Subject) -> Pace:
    """As many as pay, by what the network is."""
    return Pace(amounts(subject), lessons(subject))


def paced(subject: Subject, pace: Pace, seconds: float) -> Pace:
    """The same cut to an aim in seconds, by the time that the network takes here."""
    return cut(pace, min(1.0, SPENT * seconds / (passes(subject, pace) * _seconds_per_pass(subject))))


def cut(pace: Pace, share: float) -> Pace:
    """A share of the samples and steps, but of none too few."""
    counts = {name: _cut(count, share) for name, count in asdict(pace.amounts).items()}
    counts["calibration"] = min(pace.amounts.calibration, counts["matched"] or pace.amounts.calibration)
    small = min(1.0, SMALL * share)
    plans = tuple(
        replace(plan, steps=_cut(plan.steps, share), batch=_cut(plan.batch, small)) for plan in pace.lessons
    )
    return Pace(Amounts(**counts), plans, share)


def passes(subject: Subject, pace: Pace) -> float:
    """Samples that go through the network forward and back, in all."""
    counts = pace.amounts
    made: float = MATCHING * (counts.matched + counts.judged)
    if not counts.matched:
        made = MOVING * (counts.pool / 4 + counts.judged) if subject.kind == "image" else counts.pool
    return made + STEP * sum(plan.steps * plan.batch for plan in pace.lessons)


def _cut(count: int, share: float) -> int:
    return min(count, max(LEAST, round(count * share)))


def _seconds_per_pass(subject: Subject) -> float:
    with seeded(0):
        x = torch.randn(TIMED, *subject.sample_shape, device=subject.device, requires_grad=True)
    for _ in range(2):  # the first calls choose kernels
        start = time.monotonic()
        float(torch.autograd.grad(subject.teacher(x).sum(), x)[0].sum())
    return (time.monotonic() - start) / TIMED
