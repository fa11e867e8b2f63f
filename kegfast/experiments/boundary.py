"""Losses with little data, and decision boundaries (Heo et al. 2019), on MNIST: `kegfast reproduce boundary`.

A LeNet5 of half the width learns from a hundredth and a tenth of the training set, alone and by each loss
from a LeNet5 that saw all of it. Two students of all data, by soft targets and by boundary samples, are
compared by how alike their boundaries are to the teacher's.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kegfast
from kegfast import data
from kegfast.distillation import Term, boundary, fitnets
from kegfast.experiments.trial import Trial, beginning, spreads, trials
from kegfast.loop import mix
from kegfast.models import LeNet5
from kegfast.training import evaluate, train

Loss = str | list[Term]

_PAPER = [
    Term("hard_label"),
    # The paper's distillation terms lack soft_target's factor T^2.
    Term("soft_target", lambda done: boundary.soft_weight(done) / boundary.TEMPERATURE**2),
    Term("boundary", boundary.boundary_weight),
]

LOSSES: dict[str, Loss] = {
    "alone": "hard_label",
    "soft_target": "hard_label+soft_target",
    "logit_regression": "hard_label+logit_regression",
    "noisy_logits": "hard_label+noisy_logits",
    # On the last embedding, as in the paper: on the logits the angles drive this student into one point.
    "rkd": "hard_label+rkd_distance@fc1:25+rkd_angle@fc1:50",
    "hint": "hard_label+soft_target",  # after a stage on conv2's features
    "boundary": _PAPER,
}
"""What each student minimises; all of them see the labels."""

COMPARED: dict[str, Loss] = {"alone": "hard_label", "soft_target": _PAPER[:-1], "boundary": _PAPER}
"""The students whose boundaries are compared with the teacher's; each has a term more than the last."""

HINT_LAYERS = "conv2"


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One run of everything per seed.
        shares: Parts of the training set that students see.
        teacher_epochs: Passes of the teacher over the whole set.
        steps: Of each student, whatever its share; a hint's stage has a third of them.
        batch_size: Of all runs.
        lr: First learning rate of Adam.
        compared: Test samples whose perturbations are compared.
        methods: Keys of `LOSSES`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.01, 0.1)
    teacher_epochs: int = 10
    steps: int = 3000
    batch_size: int = 128
    lr: float = 1e-3
    compared: int = 1000
    methods: tuple[str, ...] = tuple(LOSSES)


class HalfLeNet5(nn.Sequential):
    """LeNet5 with half the channels: 3, 8 and 60, then 42."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool1 = nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.act2, self.pool2 = nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.act3, self.flat = nn.Conv2d(8, 60, 5), nn.ReLU(), nn.Flatten()
        self.fc1, self.act4, self.fc2 = nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10)


def run(
    output: str | Path, root: str | Path | None = None, config: Config = Config(), progress: bool = False
) -> dict[str, Any]:
    """Run what is missing of the experiment.

    Args:
        output: A folder for results.json and, while a model trains, its checkpoint. A
            stopped run continues from there.
        root: The folder with `mnist/`; OpenML's copy when None.
        config: What to run.
        progress: Show bars on a terminal.

    Returns:
        Test accuracies in percent and the boundaries' measures, as mean and spread over the seeds.
    """
    splits = data.load("mnist", root)
    return spreads([_Run(trial, config, splits).all() for trial in trials(output, config, progress)])


class _Run:
    """All cells of one seed."""

    def __init__(self, trial: Trial, config: Config, splits: data.Splits):
        self.trial, self.config, self.splits = trial, config, splits

    def all(self) -> dict[str, float]:
        cell = self.trial.cell
        found = {"teacher": cell("teacher", lambda: evaluate(self.teacher, self.splits.test))}
        for share in self.config.shares:
            for method in self.config.methods:
                name = f"{100 * share:g} %, {method}"
                found[name] = cell(name, lambda n=name, m=method, s=share: self._accuracy(n, m, s))
        for method in COMPARED:
            name = f"boundaries, {method}"
            part = cell(name, lambda n=name, m=method: self._compare(n, COMPARED[m]))
            found |= {f"{name}: {key}": value for key, value in part.items()}
        return found

    @cached_property
    def teacher(self) -> nn.Module:
        teacher = beginning(LeNet5, mix(self.trial.seed, 0))
        options = {"epochs": self.config.teacher_epochs, "batch_size": self.config.batch_size}
        train(teacher, self.splits.train, **options, **self.trial.resumed("teacher"))
        return teacher.eval()

    def _accuracy(self, name: str, method: str, share: float) -> float:
        student = self._student(name, LOSSES[method], share, hints=method == "hint")
        return evaluate(student, self.splits.test)

    def _student(self, name: str, loss: Loss, share: float = 1.0, hints: bool = False) -> nn.Module:
        """A student; all of a seed begin alike."""
        config = self.config
        student = beginning(HalfLeNet5, mix(self.trial.seed, 1))
        samples = _part(self.splits.train, share, self.trial.seed)
        options = {
            "loss": loss,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "temperature": boundary.TEMPERATURE,
            **self.trial.resumed(name),
        }
        if hints:
            first = config.steps // 3
            options |= {"layers": HINT_LAYERS, "hint_steps": first, "steps": config.steps - first}
            fitnets(student, self.teacher, samples, **options)
        else:
            kegfast.distill(student, self.teacher, samples, steps=config.steps, label=name, **options)
        return student.eval()

    def _compare(self, name: str, loss: Loss) -> dict[str, float]:
        """Similarities of the vectors to the teacher's and to the student's boundary, all data seen.

        Samples and targets depend on the teacher alone; those count that the student, too, puts into their
        class, and from which both searches reach the target.
        """
        student = self._student(name, loss)
        samples, labels = (x[: self.config.compared] for x in self.splits.test.tensors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trial.seed)
            found = boundary.boundary_samples(self.teacher, samples, labels, count=len(samples))
        bases = samples[found.index]
        theirs = found.samples - bases
        ours, reached = boundary.perturbations(student, bases, found.base, found.target)
        with torch.no_grad():
            both = found.accepted & reached & (student(bases).argmax(dim=1) == found.base)
            across = self.teacher(found.samples).argmax(dim=1) == found.target
        return {
            "accuracy": evaluate(student, self.splits.test),
            "percent of bases accepted": _percent(found.accepted),
            "percent of accepted across": _percent(across[found.accepted]),
            "percent compared": _percent(both),
            "MagSim": float(boundary.magnitude_similarity(theirs[both], ours[both])),
            "AngSim": float(boundary.angle_similarity(theirs[both], ours[both])),
        }


def _percent(x: Tensor) -> float:  # bool
    return 100 * float(x.float().mean())


def _part(dataset: TensorDataset, share: float, seed: int) -> TensorDataset:
    """The same number of samples of every class, drawn by the seed."""
    samples, labels = dataset.tensors
    if share == 1.0:
        return dataset
    generator = torch.Generator().manual_seed(mix(seed, 2))
    order = torch.randperm(len(labels), generator=generator)
    classes = labels.unique()
    each = round(share * len(labels) / len(classes))
    chosen: list[Tensor] = [order[labels[order] == k][:each] for k in classes]
    return TensorDataset(*(x[torch.cat(chosen)] for x in (samples, labels)))
