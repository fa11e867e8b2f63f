"""Losses with little data, and decision boundaries (Heo et al. 2019), on MNIST: `kegfast reproduce boundary`.

A LeNet5 of half the width learns from a hundredth and a tenth of the training set, alone and by each loss
from a LeNet5 that saw all of it. Three students of all data, by labels, with soft targets and with boundary
samples, are compared by how alike their boundaries are to the teacher's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kegfast
from kegfast import data
from kegfast.distillation import Term, boundary, fitnets
from kegfast.experiments.ledger import spread
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

MEASURES = {"MagSim": boundary.magnitude_similarity, "AngSim": boundary.angle_similarity}

HINT_LAYERS = "conv2"


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One run of everything per seed; all students learn from one teacher.
        shares: Parts of the training set that students see.
        teacher_epochs: Passes of the teacher over the whole set.
        steps: Of each student of a part, whatever its share; a hint's stage has a third of them.
        long: Steps of each student whose boundaries are compared.
        batch_size: Of all runs.
        lr: First learning rate of Adam.
        compared: Test samples whose perturbations, towards nine classes each, are compared.
        methods: Keys of `LOSSES`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.01, 0.1)
    teacher_epochs: int = 5
    steps: int = 1200
    long: int = 1500
    batch_size: int = 128
    lr: float = 1e-3
    compared: int = 500
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
    runs = trials(output, config, progress)
    shared = Trial(0, runs[0].ledger, progress, name="shared")

    @cache
    def teacher() -> nn.Module:
        model = beginning(LeNet5, 0)
        options = {"epochs": config.teacher_epochs, "batch_size": config.batch_size}
        train(model, splits.train, **options, **shared.resumed("teacher"))
        return model.eval()

    found = [_Run(trial, config, splits, teacher).all() for trial in runs]
    accuracy = shared.cell("teacher", lambda: evaluate(teacher(), splits.test))
    return {"teacher": spread([accuracy]), **spreads(found)}


class _Run:
    """All cells of one seed."""

    def __init__(self, trial: Trial, config: Config, splits: data.Splits, teacher: Callable[[], nn.Module]):
        self.trial, self.config, self.splits, self.teacher = trial, config, splits, teacher

    def all(self) -> dict[str, float]:
        cell, found = self.trial.cell, {}
        for share in self.config.shares:
            for method in self.config.methods:
                name = f"{100 * share:g} %, {method}"
                found[name] = cell(name, lambda n=name, m=method, s=share: self._accuracy(n, m, s))
        return found | cell("boundaries", self._compare)

    def _accuracy(self, name: str, method: str, share: float) -> float:
        config, first = self.config, self.config.steps // 3
        samples = _part(self.splits.train, share, self.trial.seed)
        options = {"steps": config.steps}
        if method == "hint":
            options = {"layers": HINT_LAYERS, "hint_steps": first, "steps": config.steps - first}
        return evaluate(self._student(name, LOSSES[method], samples, **options), self.splits.test)

    def _student(self, name: str, loss: Loss, samples: TensorDataset, **options: Any) -> nn.Module:
        """A student; all of a seed begin alike."""
        student = beginning(HalfLeNet5, mix(self.trial.seed, 1))
        teach = fitnets if "layers" in options else kegfast.distill
        teach(
            student,
            self.teacher(),
            samples,
            loss=loss,
            batch_size=self.config.batch_size,
            lr=self.config.lr,
            temperature=boundary.TEMPERATURE,
            **options,
            **self.trial.resumed(name),
        )
        return student.eval()

    def _compare(self) -> dict[str, float]:
        """How alike the boundaries of students of all data are to the teacher's.

        The vectors are those from test samples to every other class that all searches, the teacher's and
        each student's, begin in the right class and bring to their target.
        """
        samples, labels = (x[: self.config.compared] for x in self.splits.test.tensors)
        found = self._accepted(samples, labels)
        classes = torch.arange(10)
        targets = classes.expand(len(labels), 10)[classes != labels.unsqueeze(1)]  # nine of each sample
        samples, labels = samples.repeat_interleave(9, dim=0), labels.repeat_interleave(9)
        models = {"teacher": self.teacher()}
        for name, loss in COMPARED.items():
            models[name] = self._student(
                f"boundaries, {name}", loss, self.splits.train, steps=self.config.long
            )
            found[f"boundaries, {name}: accuracy"] = evaluate(models[name], self.splits.test)
        vectors = {}
        usable = torch.ones_like(labels, dtype=torch.bool)
        for name, model in models.items():
            vectors[name], reached = boundary.perturbations(model, samples, labels, targets)
            with torch.no_grad():
                usable &= reached & (model(samples).argmax(dim=1) == labels)
        theirs = vectors.pop("teacher")[usable]
        for name, ours in vectors.items():
            for measure, similarity in MEASURES.items():
                found[f"boundaries, {name}: {measure}"] = float(similarity(theirs, ours[usable]))
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
            "boundaries: percent of bases accepted": _percent(found.accepted),
            "boundaries: percent of the accepted across": _percent(across),
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
