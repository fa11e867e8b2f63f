"""One experiment of the paper, cell by cell: a student, a method, a seed, and a choice without data."""

import logging
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kegfast import compression
from kegfast.check import expected
from kegfast.data import DataInfo, Splits
from kegfast.distillation import Pool, distill
from kegfast.experiments.ledger import Ledger
from kegfast.experiments.paper import METHODS, Config, Paper
from kegfast.experiments.sources import Sources
from kegfast.loop import mix
from kegfast.training import evaluate

log = logging.getLogger(__name__)

RANKS = ("paper", "budget")
"""Where the ranks come from: the paper's, or `compress(budget=...)` at the same number of parameters."""
CALIBRATION = 512
"""Samples that the default recipe's factors are solved on."""


class Study:
    """All cells of one data set; those in the ledger are not computed again.

    Args:
        paper: the experiment.
        info: the samples' shape and normalisation.
        splits: the data, or None: then there is no oracle, and no accuracy but agreement.
        teacher: in eval mode.
        output: folder for results, generators and unfinished students.
        config: budgets; the experiment's own when None.
        progress: show bars on a terminal.
    """

    def __init__(
        self,
        paper: Paper,
        info: DataInfo,
        splits: Splits | None,
        teacher: nn.Module,
        output: Path,
        config: Config | None = None,
        progress: bool = False,
    ):
        self.paper, self.info, self.splits = paper, info, splits
        self.teacher = teacher.eval()
        self.output, self.progress = output, progress
        self.config = config or paper.config
        self.teacher_accuracy = self.accuracy(teacher)
        identity = {"dataset": paper.dataset, "teacher": self.teacher_accuracy, **asdict(self.config)}
        self.ledger = Ledger(output / "cells.json", identity)
        self._sources: dict[int, Sources] = {}

    def accuracy(self, model: nn.Module) -> float | None:
        """Test accuracy in percent, None without a test set."""
        return None if self.splits is None else evaluate(model, self.splits.test)

    def sources(self, seed: int) -> Sources:
        """The sources of one seed."""
        if seed not in self._sources:
            train = None if self.splits is None else self.splits.train
            self._sources = {
                seed: Sources(
                    self.paper, self.info, self.teacher, train,
                    self.output, self.ledger, self.config, seed, self.progress,
                )
            }  # fmt: skip
        return self._sources[seed]

    def run(
        self,
        students: Iterable[int],
        seeds: Iterable[int],
        methods: Sequence[str] = METHODS,
        ranks: Sequence[str] = RANKS,
        seconds: float | None = None,
    ) -> list[str]:
        """Compute what is missing, one method's pool at a time.

        Args:
            students: numbers of the paper's students.
            seeds: one run of everything per seed.
            methods: of `METHODS`.
            ranks: of `RANKS`.
            seconds: start no cell after that time.

        Returns:
            Names of cells that the time did not suffice for.
        """
        start, left = time.monotonic(), []
        for seed in seeds:
            for method in methods:
                if not self.sources(seed).has(method):
                    continue
                names = [(s, r, cell_name(s, r, method, seed)) for s in students for r in ranks]
                missing = [entry for entry in names if entry[2] not in self.ledger.cells]
                if seconds is not None and time.monotonic() - start > seconds:
                    left += [name for _, _, name in missing]
                elif missing:
                    self._method(seed, method, missing)
        return left

    def student(self, number: int, ranks: str, method: str, seed: int) -> nn.Module:
        """A freshly compressed student; the default recipe solves its factors on artificial samples."""
        if number not in self.paper.students:
            raise ValueError(expected("students", f"of {sorted(self.paper.students)}", number))
        own = dict(self.paper.students[number].ranks)
        student, report = compression.compress(self.teacher, own)
        spend = {"rank": own} if ranks == "paper" else {"budget": {"params": 1 / report.ratio}}
        if method == "kegfast":
            spend["calibration"] = self.sources(seed).draw("kegfast", CALIBRATION)
            spend["samples"] = CALIBRATION
        elif ranks == "paper":
            return student
        return compression.compress(self.teacher, **spend)[0]

    def weights(self, name: str) -> Path:
        """The file of a cell's chosen student."""
        return self.output / "students" / f"{name.replace('/', '-')}.safetensors"

    def _method(self, seed: int, method: str, missing: list[tuple[int, str, str]]) -> None:
        sources = self.sources(seed)
        pool, seconds = (None, 0.0) if method == "tucker-only" else sources.pool(method)
        probes = {} if pool is None else sources.probes(method)
        for number, ranks, name in missing:
            log.info("%s %s", self.paper.dataset, name)
            student = self.student(number, ranks, method, seed)
            self.ledger.cell(name, lambda: self._cell(name, student, pool, probes, seconds, method, seed))  # noqa: B023

    def _cell(
        self,
        name: str,
        student: nn.Module,
        pool: Pool | None,
        probes: dict[str, Tensor],
        seconds: float,
        method: str,
        seed: int,
    ) -> dict[str, Any]:
        start = time.monotonic()
        candidates = [deepcopy(student)]
        if pool is not None:
            candidates += self._teach(name, student, pool, method, seed)
        agreement = [self._agreement(model, probes) for model in candidates]
        chosen = max(range(len(candidates)), key=lambda i: sum(agreement[i].values()))
        seconds += time.monotonic() - start
        accuracy = [self.accuracy(model) for model in candidates]
        compression.save(candidates[chosen], self.weights(name))
        for leg in self.output.glob(f"{self.weights(name).stem}-leg*.pt"):
            leg.unlink()
        parameters = sum(p.numel() for p in student.parameters())
        before = sum(p.numel() for p in self.teacher.parameters())
        return {
            "accuracy": accuracy[chosen],
            "candidates": accuracy,
            "agreement": agreement,
            "chosen": chosen,
            "params": parameters,
            "ratio": before / parameters,
            "seconds": seconds,
            "samples": 0 if pool is None else len(pool),
        }

    def _teach(
        self, name: str, student: nn.Module, pool: Pool, method: str, seed: int
    ) -> list[nn.Module]:  # the student after each leg
        schedule, config = self.paper.schedule(method), self.config
        legs = []
        for leg, rate in enumerate(schedule.rates):
            distill(
                student,
                self.teacher,
                pool,
                steps=max(1, config.steps // len(schedule.rates)),
                batch_size=config.batch_size,
                lr=rate,
                temperature=config.temperature,
                student_batchnorm=schedule.batchnorm,
                seed=mix(seed, leg),
                checkpoint=self.output / f"{self.weights(name).stem}-leg{leg}.pt",
                resume=True,
                progress=self.progress,
                label=f"{name} leg {leg}",
            )
            legs.append(deepcopy(student))
        return legs

    def _agreement(self, student: nn.Module, probes: dict[str, Tensor]) -> dict[str, float]:
        """Percent of each probe's samples that student and teacher put into one class."""
        found = {}
        for name, samples in probes.items():
            with torch.no_grad():
                answers = [model.eval()(samples).argmax(1) for model in (student, self.teacher)]
            found[name] = 100.0 * float((answers[0] == answers[1]).float().mean())
        return found


def cell_name(student: int, ranks: str, method: str, seed: int) -> str:
    """The key of one cell in the ledger."""
    return f"s{student}/{ranks}/{method}/{seed}"
