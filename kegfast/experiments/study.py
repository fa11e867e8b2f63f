"""One experiment of the paper, cell by cell: a student, a method, a seed, and a choice without data."""

import logging
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast import compression
from kegfast._util.check import expected
from kegfast._util.machine import measured
from kegfast._util.modules import channels_last
from kegfast.data import DataInfo, Splits
from kegfast.distillation import InMemory, distill
from kegfast.experiments.epochs import teach
from kegfast.experiments.ledger import Ledger
from kegfast.experiments.paper import METHODS, Config, Paper, Schedule, schedule
from kegfast.experiments.sources import Sources
from kegfast.experiments.tails import head_outputs, tail
from kegfast.extraction.parallel import own_path
from kegfast.recovery.judge import answers, choice
from kegfast.recovery.teaching import LOOK, objective
from kegfast.training import evaluate
from kegfast.training.loop import MetricsLog, mix
from kegfast.training.processes import agreed, place, replicated

log = logging.getLogger(__name__)

RANKS = ("paper", "budget")
"""Where the ranks come from: the paper's, or `compress(budget=...)` at the same number of parameters."""
BUDGETED = ("tucker-only", "kegfast", "oracle")
"""Methods that are run at both kinds of ranks unless ranks are asked for: where ranks by budget start, end,
and could end. The others were published at the paper's."""


@dataclass(frozen=True)
class Lesson:
    """What students of one method are taught with.

    Attributes:
        pool: what they see: samples, or what the layers that they share with the teacher make of them.
        whole: some samples, before any layer.
        shared: these layers.
        schedule: of the method.
        seed: of the order.
    """

    pool: InMemory
    whole: Tensor
    shared: Sequence[str]
    schedule: Schedule
    seed: int


class Study:
    """All cells of one data set; those in the ledger are not computed again.

    Args:
        paper: the experiment.
        info: the samples' shape and normalization.
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
        identity = {"dataset": paper.dataset, "teacher": self.teacher_accuracy, **self.config.identity()}
        self.ledger = Ledger(output / "cells.json", identity)
        self._sources: dict[int, Sources] = {}
        self._untaught: dict[tuple[int, str], float | None] = {}

    def accuracy(self, model: nn.Module) -> float | None:
        """Test accuracy in percent, None without a test set."""
        return None if self.splits is None else evaluate(model, self.splits.test)

    def tested(self, model: nn.Module) -> dict[str, Any] | None:
        """The test set, its size, and the percent of it that a student and the teacher put into one class."""
        if self.splits is None:
            return None
        test = self.splits.test
        probes = {"test": test.tensors[0]}
        return {
            "set": test.info.name,
            "n": len(test),
            "agreement": self._agreements([model], probes)[0]["test"],
        }

    def sources(self, seed: int) -> Sources:
        """The sources of one seed."""
        if seed not in self._sources:
            train = self.splits.train if self.splits is not None and len(self.splits.train) else None
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
        ranks: Sequence[str] | None = None,
        seconds: float | None = None,
    ) -> list[str]:
        """Compute what is missing, one method's pool at a time.

        Args:
            students: numbers of the paper's students.
            seeds: one run of everything per seed.
            methods: of `METHODS`.
            ranks: of `RANKS`; None is the paper's for all methods, and by budget for those of `BUDGETED`.
            seconds: start no cell after that time.

        Returns:
            Names of cells that the time did not suffice for.
        """
        start, left = time.monotonic(), []
        for seed in seeds:
            for method in methods:
                if not self.sources(seed).has(method):
                    continue
                kinds = ranks or (RANKS if method in BUDGETED else RANKS[:1])
                names = [(s, r, cell_name(s, r, method, seed)) for s in students for r in kinds]
                missing = [entry for entry in names if entry[2] not in self.ledger.cells]
                for _, _, name in names:
                    if name in self.ledger.cells:  # a kill may have come before they were removed
                        self._drop_legs(name)
                if agreed(seconds is not None and time.monotonic() - start > seconds):
                    left += [name for _, _, name in missing]
                elif missing:
                    self._method(seed, method, missing)
        return left

    def starts(self, number: int, ranks: str, method: str, seed: int) -> list[nn.Module]:
        """Freshly compressed students, of which the one closest to the teacher is taught.

        By budget the default recipe adds one whose factors are solved on its artificial samples. The paper's
        ranks leave so little of some layers that solving them one by one leads astray.
        """
        if number not in self.paper.students:
            raise ValueError(expected("students", f"of {sorted(self.paper.students)}", number))
        own = dict(self.paper.students[number].ranks)
        plain, report = compression.compress(self.teacher, own)
        spend: dict[str, Any] = {"rank": own}
        if ranks == "budget":
            spend = {"budget": {"params": 1 / report.ratio}}
            plain = compression.compress(self.teacher, **spend)[0]
        if method != "kegfast" or ranks == "paper":
            return [plain]
        samples = self.sources(seed).calibration()
        solved = compression.compress(self.teacher, calibration=samples, samples=len(samples), **spend)[0]
        return [plain, solved]

    def weights(self, name: str) -> Path:
        """The file of a cell's chosen student."""
        return self.output / "students" / f"{name.replace('/', '-')}.safetensors"

    def _method(self, seed: int, method: str, missing: list[tuple[int, str, str]]) -> None:
        sources = self.sources(seed)
        pool, seconds = (None, 0.0) if method == "tucker-only" else sources.pool(method)
        probes = {} if pool is None else sources.probes(method)
        judge = None if pool is None else sources.judge()
        lessons: dict[str, Lesson] = {}
        for number, ranks, name in missing:
            log.info("%s %s", self.paper.dataset, name)
            start = time.process_time()
            if pool is not None and ranks not in lessons and not sources.as_published:
                lessons[ranks] = self.lesson(pool, ranks, method, seed)
            starts = self.starts(number, ranks, method, seed)
            more: dict[str, Any] = {}
            if pool is not None and judge is not None and sources.as_published:
                candidates, more = self.epochs(name, starts[0], pool, method, judge)
                divergence = [self._divergence(model, judge) for model in candidates]
                chosen = len(candidates) - 1
            else:
                candidates, divergence = self.candidates(name, starts, lessons.get(ranks), judge)
                chosen = choice(divergence)
            spent = seconds + time.process_time() - start
            compression.save(candidates[chosen], self.weights(name))
            result = {
                "accuracy": self._accuracies(number, ranks, candidates),
                "agreement": self._agreements(candidates, probes),
                "tested": self.tested(candidates[chosen]),
                "divergence": divergence,
                "chosen": chosen,
                "seconds": spent,
                "samples": 0 if pool is None else len(pool),
                **self._size(candidates[chosen]),
                **more,
                "measured": measured(),
            }
            self.ledger.cell(name, result.copy)
            self._drop_legs(name)

    def _drop_legs(self, name: str) -> None:
        """Remove the checkpoints of a finished cell."""
        for kind in ("leg*.pt", "epochs.pt*"):
            for left in self.output.glob(f"{self.weights(name).stem}-{kind}"):
                left.unlink(missing_ok=True)

    def lesson(self, pool: InMemory, ranks: str, method: str, seed: int) -> Lesson:
        """What students of one kind of ranks learn from a pool of one method."""
        shared = self.paper.shared if ranks == "paper" else ()
        subject = self.sources(seed).subject
        plan = schedule(subject, method, ranks)
        whole = pool.tensor[:LOOK]
        if shared:
            pool = InMemory(head_outputs(self.teacher, shared, pool.tensor))
        return Lesson(pool, whole, shared, plan, seed)

    def candidates(
        self, name: str, starts: list[nn.Module], lesson: Lesson | None, judge: Tensor | None
    ) -> tuple[list[nn.Module], list[float]]:
        """The starts, then the closest of them after each leg; how far each diverges from the teacher."""
        if lesson is None or judge is None:
            return list(starts), [0.0] * len(starts)
        found = [self._divergence(model, judge) for model in starts]
        legs = self.teach(name, deepcopy(starts[found.index(min(found))]), lesson)
        return [*starts, *legs], found + [self._divergence(model, judge) for model in legs]

    def epochs(
        self, name: str, student: nn.Module, pool: InMemory, method: str, judge: Tensor
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        """The student before and after it was taught as published, and what there is to say of that."""
        plan = self.paper.published.epochs(method)
        taught = channels_last(deepcopy(student))
        known = answers(self.teacher, judge)
        rank, world = place()
        found = teach(
            taught,
            pool.tensor,
            _logits(self.teacher, pool.tensor),
            plan,
            lambda model: _kl(answers(model, judge), known),
            self.accuracy,
            most=plan.within(self.config.steps, len(pool)),
            amp=self.config.amp,
            checkpoint=own_path(self.output / f"{self.weights(name).stem}-epochs.pt", rank, world),
            metrics=MetricsLog(self.output / "metrics.jsonl") if rank == 0 else None,
            progress=self.progress,
            label=name,
        )
        return [student, taught], asdict(found)

    def _size(self, student: nn.Module) -> dict[str, float]:
        own, teacher = (sum(p.numel() for p in model.parameters()) for model in (student, self.teacher))
        return {"params": own, "ratio": teacher / own}

    def teach(self, name: str, student: nn.Module, lesson: Lesson) -> list[nn.Module]:
        """The student after each leg."""
        plan, config = lesson.schedule, self.config
        legs, world = [], place()[1]
        subject, loss = self.sources(lesson.seed).subject, plan.loss
        if plan.hints:
            loss = objective(subject, student, lesson.whole)
        channels_last(student)
        taught, teacher = (tail(model, lesson.shared) for model in (student, self.teacher))
        for leg, rate in enumerate(plan.rates):
            distill(
                replicated(taught),
                teacher,
                lesson.pool,
                loss=loss,
                steps=max(1, (plan.steps or config.steps) // len(plan.rates)),
                batch_size=max(1, config.batch_size // world),
                lr=rate,
                temperature=config.temperature,
                student_batchnorm=plan.batchnorm,
                seed=mix(lesson.seed, leg),
                amp=config.amp,
                checkpoint=self.output / f"{self.weights(name).stem}-leg{leg}.pt" if world == 1 else None,
                resume=world == 1,
                progress=self.progress,
                label=f"{name} leg {leg}",
            )
            legs.append(deepcopy(student))
        return legs

    def _accuracies(self, number: int, ranks: str, candidates: list[nn.Module]) -> list[float | None]:
        """Of every candidate; the first, not taught yet, is the same for all methods and seeds."""
        key = number, ranks
        if key not in self._untaught:
            self._untaught[key] = self.accuracy(candidates[0])
        return [self._untaught[key], *map(self.accuracy, candidates[1:])]

    def _agreements(self, candidates: list[nn.Module], probes: dict[str, Tensor]) -> list[dict[str, float]]:
        """Percent of each probe's samples that a candidate and the teacher put into one class."""
        wanted = {name: _logits(self.teacher, samples).argmax(1) for name, samples in probes.items()}

        def percent(model: nn.Module, name: str) -> float:
            return 100.0 * float((_logits(model, probes[name]).argmax(1) == wanted[name]).float().mean())

        return [{name: percent(model, name) for name in probes} for model in candidates]

    def _divergence(self, student: nn.Module, judge: Tensor) -> float:
        """KL divergence from the teacher, mean over samples."""
        return _kl(answers(student, judge), answers(self.teacher, judge))


def _kl(own: Tensor, wanted: Tensor) -> float:
    """Divergence between logarithms of probabilities, mean over samples."""
    return float(F.kl_div(own, wanted, log_target=True, reduction="batchmean"))


@torch.no_grad()
def _logits(model: nn.Module, samples: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in samples.split(128)])


def cell_name(student: int, ranks: str, method: str, seed: int) -> str:
    """The key of one cell in the ledger."""
    return f"s{student}/{ranks}/{method}/{seed}"
