"""One run of `shrink`: samples, factors, teaching, judging and what the report needs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kegfast import compression
from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import read_tensors, save_tensors
from kegfast._util.progress import Update
from kegfast.compression.allocation import OutOfBudget
from kegfast.compression.report import CompressionReport
from kegfast.distillation.sources import Augmented, InMemory, Mixture, Pool, Source
from kegfast.recovery.data import JUDGES, Data
from kegfast.recovery.judge import Judge, choice
from kegfast.recovery.pace import Pace
from kegfast.recovery.pixels import Pixels
from kegfast.recovery.prediction import Prediction, predict
from kegfast.recovery.report import Candidate, ShrinkReport, grid, latencies
from kegfast.recovery.samples import MadeSamples, drawing, shifted
from kegfast.recovery.subject import Subject
from kegfast.recovery.teaching import teach
from kegfast.training.loop import MetricsLog, mix

log = logging.getLogger(__name__)

RATIO = 4.0
"""How many times fewer parameters, where the caller does not say."""
METRICS = "metrics.jsonl"
"""The log of a run, in its folder."""
SAMPLES, PLAN, CHECKPOINTS = "samples.safetensors", "plan.json", "checkpoint-{}.pt"
"""What it continues from."""
UNITS = 1000
"""Of the bar, for the whole run."""
CURVE = (0.5, 0.75, 1.5, 2.0)
"""Other ratios that the report foretells, as multiples of the one asked for."""


class Budget:
    """Students as small as the caller wants."""

    def __init__(
        self, subject: Subject, ratio: float | None, budget: Mapping[str, float] | int | None
    ) -> None:
        if budget is not None and ratio is not None:
            raise ValueError(expected("ratio", "left out beside a budget", ratio))
        self.subject, self.ratio = subject, ratio
        if budget is None:
            self.ratio = check.number("ratio", RATIO if ratio is None else ratio, above=1)
            budget = {"params": 1 / self.ratio}
        self.budget = budget
        self.plain = self.spent(budget)

    def spent(
        self, budget: Mapping[str, float] | int, samples: Tensor | None = None
    ) -> tuple[nn.Module, CompressionReport]:
        """A student of that size, its factors solved on samples or taken from the weights alone."""
        options: dict[str, Any] = {"budget": budget, "measure": False}
        if isinstance(budget, Mapping) and "params" not in budget:
            like = next(self.subject.model.parameters())
            options["example_input"] = torch.zeros(1, *self.subject.sample_shape).to(like)
        if samples is not None:
            options |= {"calibration": samples, "samples": len(samples)}
        try:
            return compression.compress(self.subject.model, **options)
        except OutOfBudget as error:
            if self.ratio is None:
                raise
            what = f"at most {1 / error.least:.4g} for this model, of whose layers low ranks can make no less"
            raise ValueError(expected("ratio", what, self.ratio)) from error

    def others(self) -> list[float]:
        """Fractions of parameters that the report's curve is drawn at; none beside another budget."""
        return [] if self.ratio is None else [1 / (self.ratio * k) for k in CURVE if self.ratio * k > 1]


class Recovery:
    """One run of `shrink`: each stage takes what the stages before it found.

    Attributes:
        report: what was done; complete after `student`.
        students: all that were judged, by their names in the report.
    """

    def __init__(
        self,
        subject: Subject,
        pixels: Pixels | None,
        budget: Budget,
        source: Source | None,
        data: Data | None,
        pace: Pace,
        seed: int,
        folder: Path,
        bar: Update,
    ):
        self.subject, self.budget, self.seed, self.folder = subject, budget, seed, folder
        self.report = ShrinkReport()
        self.students: dict[str, nn.Module] = {}
        self.bar, self.begun, self.share = bar, 0.0, 0.0
        if pixels is not None:
            mean, std = (", ".join(f"{value:.4g}" for value in part) for part in (pixels.mean, pixels.std))
            self.report.decisions["normalization"] = f"mean {mean}, std {std}: {pixels.origin}"
        if data is not None and not data.trusted:
            text = "left aside: BatchNorm remembers others (as source= they are changed until it knows them)"
            self.report.decisions["data"], data = text, None
        self.data = data
        self.pace = pace
        if pace.share < 1:
            self.report.decisions["time"] = f"{pace.share:.0%} of the usual samples and steps"
        self.made = MadeSamples(subject, pixels, seed, source, self.pace.amounts)

    def student(self) -> nn.Module:
        """The student, after every stage."""
        with self._stage("samples", 0.4):
            self.make()
            held = None if self.data is None else self.data.held
            self.judge = judge = Judge(self.subject, self.made.judge(), held)
        with self._stage("factors", 0.2):
            starts = self._starts()
            judged = [_candidate(name, model, judge) for name, (model, _) in starts.items()]
        before = min(judged, key=lambda one: one.divergence)
        student, self.report.compression = starts[before.name]
        self.students = {name: model for name, (model, _) in starts.items()}
        with self._stage("teaching", 0.3):
            courses = [before]
            for number, plan in enumerate(self.pace.lessons):
                name = f"{before.name}, then {plan}"
                try:
                    self.students[name] = self._taught(student, number)
                except FloatingPointError as error:  # the student from before is as good as it was
                    log.warning("%s", error)
                    self.students[name] = student
                courses.append(_candidate(name, self.students[name], judge))
        self.report.candidates = [*judged, *courses[1:]]
        self.report.before = before
        kept = choice([one.divergence for one in courses])
        self.report.chosen = courses[kept]
        none = "none: no course made the student surely closer"
        self.report.decisions["teaching"] = str(self.pace.lessons[kept - 1]) if kept else none
        self.report.predicted = self._predicted(self.report.chosen, before if kept else None)
        student = self.students[self.report.chosen.name].eval()
        return student

    def illustrate(self) -> None:
        """What the report shows beside the student: latencies, samples, other ratios."""
        with self._stage("report", 0.1):
            assert self.report.chosen is not None
            self.report.latency = latencies(self.subject, self.students[self.report.chosen.name])
            self.report.images = grid(self.made.shown())
            self.report.curve = self._curve()

    def make(self) -> None:
        """The samples that take long to make, from the run's folder where they are."""
        path = self.folder / SAMPLES
        if path.exists():
            self.made.keep(read_tensors(path)[0])
        if self.made.is_matched:
            for i, name in enumerate(self.made.parts, start=1):
                self.made.matched(name)
                save_tensors(path, self.made.kept)
                self._advance(i / len(self.made.parts))
        self.report.decisions["samples"] = self.made.description

    def _starts(self) -> dict[str, tuple[nn.Module, CompressionReport]]:
        """Students of other factors, by what these are solved on."""
        made = self.made.calibration()
        starts = {"by the weights alone": self.budget.plain}
        starts["solved on artificial samples"] = self.budget.spent(self.budget.budget, made)
        if self.data is not None and len(self.data.held):  # fewer samples could not judge what they solved
            real = self.data.taught[: max(len(made), JUDGES)]
            both = torch.cat([real, made.to(real)])
            starts["solved on data and artificial samples"] = self.budget.spent(self.budget.budget, both)
            starts["solved on data"] = self.budget.spent(self.budget.budget, real)
        return starts

    @cached_property
    def pool(self) -> Pool:
        """What students are taught with."""
        pool = self.made.pool()
        if self.data is None:
            return pool
        real: Source = InMemory(self.data.taught)
        if self.subject.kind == "image":
            real = Augmented(real, shifted)
        share = self.data.share
        given, held = len(self.data.taught), len(self.data.held)
        self.report.decisions["data"] = f"{share:.0%} of what is taught are of {given} samples; {held} judge"
        with drawing(self.seed, "data"):
            return Pool(Mixture([real, pool], [share, 1 - share]), len(pool))

    def _taught(self, student: nn.Module, number: int) -> nn.Module:
        """A copy of a student after one of the courses."""
        taught, plan = deepcopy(student), self.pace.lessons[number]
        steps = [plan.steps for plan in self.pace.lessons]
        begun, total = sum(steps[:number]), sum(steps)
        teach(
            self.subject,
            taught,
            self.pool,
            plan,
            seed=mix(self.seed, number),
            checkpoint=self.folder / CHECKPOINTS.format(number),
            resume=True,
            metrics=_Watched(self.folder / METRICS, lambda step: self._advance((begun + step) / total)),
            label=f"teaching {number + 1}",
        )
        return taught

    def _curve(self) -> list[tuple[float, Prediction]]:
        found = []
        for fraction in self.budget.others():
            try:
                student, report = self.budget.spent({"params": fraction}, self.made.calibration())
            except ValueError:  # beyond what low ranks reach
                continue
            predicted = self._predicted(_candidate("", student, self.judge))
            if predicted is not None:
                found.append((report.ratio, predicted))
        return found

    def _predicted(self, candidate: Candidate, before: Candidate | None = None) -> Prediction | None:
        held = 0 if self.data is None else len(self.data.held)
        return predict(self.subject, candidate, before, held, artificial=self.made.own is None)

    @contextmanager
    def _stage(self, name: str, share: float) -> Iterator[None]:
        log.info("%s", name)
        start, self.share = time.monotonic(), share
        yield
        self.report.seconds[name] = time.monotonic() - start
        self._advance(1.0)
        self.begun += share

    def _advance(self, done: float) -> None:
        """Shows how much of the stage is done."""
        self.bar(round(UNITS * (self.begun + self.share * done)), {})


class _Watched(MetricsLog):
    """A log that tells how far a stage is."""

    def __init__(self, path: Path, note: Callable[[int], None]):
        super().__init__(path)
        self._note = note

    def write(self, stage: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        super().write(stage, step, seconds, values)
        self._note(step)


def _candidate(name: str, student: nn.Module, judge: Judge) -> Candidate:
    verdicts = judge.verdicts(student)
    return Candidate(name, judge.divergence(verdicts), verdicts)
