"""Decision boundaries (Heo et al. 2019) and losses with little data, on MNIST: `kegfast reproduce boundary`.

A LeNet5 of half the width learns from a hundredth and a tenth of the training set, alone and by each loss
from a LeNet5 that saw all of it (`kegfast.experiments.few_data`). Three students of all data, by labels, with
soft targets and with boundary samples, are compared by how alike their boundaries are to the teacher's, which
is a LeNet5 once without and once with BatchNorm.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kegfast import data
from kegfast.distillation import Term, boundary
from kegfast.experiments import few_data, lenets
from kegfast.experiments.ledger import spread
from kegfast.experiments.lenets import PAPER, Budget, Learning, Loss
from kegfast.experiments.trial import spreads, trials
from kegfast.training import evaluate

SHARE = 0.1
"""Of the paper's weight of boundary samples, in the comparison; all of it draws boundaries in too far."""

COMPARED: dict[str, Loss] = {
    "alone": "hard_label",
    "soft_target": PAPER[:-1],
    "boundary": [*PAPER[:-1], Term("boundary", lambda done: SHARE * boundary.boundary_weight(done))],
}
"""The students whose boundaries are compared with the teacher's; each has a term more than the last."""

MEASURES = {"MagSim": boundary.magnitude_similarity, "AngSim": boundary.angle_similarity}


@dataclass(frozen=True)
class Comparison(Budget):
    """What the comparison of the boundaries depends on.

    Attributes:
        steps: Of each student.
        samples: Test samples whose perturbations, towards nine classes each, are compared.
    """

    steps: int = 3000
    samples: int = 1000


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One run of everything per seed; all learn from the same teachers.
        comparison: Of boundaries.
        few: The students of little data; None leaves them out.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    comparison: Comparison = Comparison()
    few: few_data.Config | None = field(default_factory=few_data.Config)


def run(
    output: str | Path, root: str | Path | None = None, config: Config = Config(), progress: bool = False
) -> dict[str, dict[str, float]]:
    """Run what is missing of the experiment.

    Args:
        output: A folder for the cells, `boundaries.json` and `few_data.json`, and, while a model trains, its
            checkpoint. A stopped run continues from there.
        root: The folder with `mnist/`; OpenML's copy when None.
        config: What to run.
        progress: Show bars on a terminal.

    Returns:
        Test accuracies in percent and the boundaries' measures, as mean and spread over the seeds.
    """
    splits = data.load("mnist", root)
    runs = trials(output, "boundaries", config.seeds, config.comparison, progress)
    shared = runs[0].shared()
    teachers = {name: lenets.teacher(shared, config.comparison, splits, name) for name in lenets.TEACHERS}
    results = {}
    for name, teacher in teachers.items():
        accuracy = shared.cell(name, partial(_accuracy, teacher, splits))
        results[f"{name}: accuracy"] = spread([accuracy])
        results |= spreads([_Run(trial, config.comparison, splits, teacher).all(name) for trial in runs])
    if (few := config.few) is not None:
        runs = trials(output, "few_data", config.seeds, few, progress)
        results |= spreads([few_data.Run(trial, few, splits, teachers["LeNet5"]).all() for trial in runs])
    return results


def _accuracy(teacher: Callable[[], nn.Module], splits: data.Splits) -> float:
    return evaluate(teacher(), splits.test)


class _Run(Learning[Comparison]):
    """The cell of one seed and teacher."""

    def all(self, teacher: str) -> dict[str, float]:
        found = self.trial.cell(teacher, lambda: self._compare(teacher))
        return {f"{teacher}, {name}": value for name, value in found.items()}

    def _compare(self, teacher: str) -> dict[str, float]:
        """How alike the boundaries of students of all data are to the teacher's.

        The vectors are those from test samples to every other class that all searches, the teacher's and
        each student's, begin in the right class and bring to their target.
        """
        samples, labels = (x[: self.config.samples] for x in self.splits.test.tensors)
        found = self._accepted(samples, labels)
        classes = torch.arange(10)
        targets = classes.expand(len(labels), 10)[classes != labels.unsqueeze(1)]  # nine of each sample
        samples, labels = samples.repeat_interleave(9, dim=0), labels.repeat_interleave(9)
        models = {"teacher": self.teacher()}
        for name, loss in COMPARED.items():
            file = name if name == "alone" else f"{teacher}, {name}"  # one for all teachers
            models[name] = self.student(file, loss, self.splits.train, steps=self.config.steps)
            found[f"{name}: accuracy"] = evaluate(models[name], self.splits.test)
        vectors = {}
        usable = torch.ones_like(labels, dtype=torch.bool)
        for name, model in models.items():
            vectors[name], reached = boundary.perturbations(model, samples, labels, targets)
            with torch.no_grad():
                usable &= reached & (model(samples).argmax(dim=1) == labels)
        found["percent of the vectors compared"] = _percent(usable)
        vectors = {name: each[usable] for name, each in vectors.items()}
        for name, ours in vectors.items():
            found[f"{name}: length"] = float(ours.flatten(1).norm(dim=1).mean())
        theirs = vectors.pop("teacher")
        for name, ours in vectors.items():
            for measure, similarity in MEASURES.items():
                found[f"{name}: {measure}"] = float(similarity(theirs, ours))
        return found

    def _accepted(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """How many base samples `boundary_samples` accepts, and how many of these are across."""
        teacher = self.teacher()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trial.seed)
            found = boundary.boundary_samples(teacher, samples, labels, count=len(samples))
        with torch.no_grad():
            across = teacher(found.samples[found.accepted]).argmax(dim=1) != found.base[found.accepted]
        return {
            "percent of bases accepted": _percent(found.accepted),
            "percent of the accepted across": _percent(across),
        }


def _percent(x: Tensor) -> float:  # bool
    return 100 * float(x.float().mean())
