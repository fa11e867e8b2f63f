"""Hinton, Vinyals and Dean (2015), section 3, on MNIST: `kegfast reproduce hinton`.

Errors of a thousand-unit teacher and of smaller students, trained alone and distilled; of students whose
transfer set lacks classes (`kegfast.experiments.missing`); of one student of five networks
(`kegfast.experiments.ensemble`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast.data.splits import Splits
from kegfast.distillation import Augmented
from kegfast.distillation.sources import Source
from kegfast.experiments import ensemble, missing
from kegfast.experiments.ledger import spread
from kegfast.experiments.perceptrons import Budget, Learning, load, network
from kegfast.experiments.trial import Trial, beginning, spreads, trials

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Students(Budget):
    """What the errors of the teacher and its students depend on.

    The paper's temperature is 20; it finds all above 8 alike from 300 units on, 2.5 to 4 best for 30. In so
    few passes a low one served 800 units better.

    Attributes:
        teacher_units: Width of the teacher's two hidden layers, as in the paper.
        student_units: The student's, as in the paper.
        dropout: The teacher's, on its hidden layers.
        jitter: Pixels by which the teacher's images move, at most; the paper's students see them unmoved.
        turn: Degrees by which they turn, at most; the paper's do not.
        zoom: Share by which they grow or shrink, at most; the paper's do not.
        teacher_epochs: Passes of the teacher over the training set.
        student_epochs: Passes of each student, in steps.
    """

    teacher_units: int = 1200
    student_units: int = 800
    dropout: float = 0.25
    jitter: float = 2.0
    turn: float = 10.0
    zoom: float = 0.1
    teacher_epochs: int = 60
    student_epochs: int = 25


@dataclass(frozen=True)
class Config:
    """What the results depend on.

    Attributes:
        seeds: One student of each kind per seed; all learn from one teacher.
        students: Of the large teacher.
        lacking: The students that never see some classes; None leaves them out.
        several: The ensemble and its student; None leaves them out.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    students: Students = Students()
    lacking: missing.Config | None = field(default_factory=missing.Config)
    several: ensemble.Config | None = field(default_factory=ensemble.Config)


def run(
    output: str | Path, root: str | Path | None = None, config: Config = Config(), progress: bool = False
) -> dict[str, dict[str, float]]:
    """Run what is missing of the experiment.

    Args:
        output: A folder for the cells, `students.json`, `missing.json` and `ensemble.json`, and, while
            a model trains, its checkpoint. A stopped run continues from there.
        root: The folder with `mnist/`; OpenML's copy when None.
        config: What to run.
        progress: Show bars on a terminal.

    Returns:
        Test errors out of 10,000 as mean and spread over the seeds, by name.
    """
    splits = load(root)
    runs = trials(output, "students", config.seeds, config.students, progress)
    shared = Learning(runs[0].shared(), config.students, splits)

    @cache
    def teacher() -> nn.Module:
        students = config.students
        model = beginning(lambda: network(students.teacher_units, students.dropout), 0)
        return shared.trained("teacher", model, students.teacher_epochs, augment=_mover(students))

    errors = shared.errors("teacher", lambda name: teacher())
    found = [_Run(trial, config.students, splits, teacher).all() for trial in runs]
    results = {"teacher": spread([errors]), **spreads(found)}
    if (lacking := config.lacking) is not None:
        runs = trials(output, "missing", config.seeds, lacking, progress)
        results |= spreads([missing.Run(trial, lacking, splits, teacher).all() for trial in runs])
    if (several := config.several) is not None:
        runs = trials(output, "ensemble", config.seeds, several, progress)
        results |= spreads([ensemble.Run(trial, several, splits).all() for trial in runs])
    return results


class _Run(Learning[Students]):
    """All cells of one seed; its students begin alike."""

    def __init__(self, trial: Trial, config: Students, splits: Splits, teacher: Callable[[], nn.Module]):
        super().__init__(trial, config, splits)
        self.teacher = teacher

    def all(self) -> dict[str, float]:
        return {
            "student alone": self.errors("student alone", self._alone),
            "distilled": self.errors("distilled", self._distilled),
            "distilled on moved images": self.errors(
                "distilled on moved images", lambda name: self._distilled(name, self._moved())
            ),
        }

    def _alone(self, name: str) -> nn.Module:
        return self.trained(name, self.beginning(self.config.student_units), self.config.student_epochs)

    def _distilled(self, name: str, source: Source | None = None) -> nn.Module:
        student = self.beginning(self.config.student_units)
        return self.taught(name, student, self.teacher(), self.steps(self.config.student_epochs), source)

    def _moved(self) -> Source:
        """The training images as the teacher saw them."""
        return Augmented(self.transfer_set(), _mover(self.config))


def _mover(config: Students) -> Move:
    """Moves, turns and scales every image of a batch by its own draws."""

    def move(images: Tensor) -> Tensor:  # (N, C, H, W)
        turn, zoom, right, down = 2 * torch.rand(4, len(images)) - 1
        angle, scale = math.radians(config.turn) * turn, 1 + config.zoom * zoom
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        half = images.shape[-1] / 2  # affine_grid measures in halves of the image
        x, y = config.jitter / half * right, config.jitter / half * down
        rows = torch.stack([cosine, -sine, x, sine, cosine, y], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    return move
