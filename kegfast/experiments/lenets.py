"""LeNet5s on MNIST and students of half their width: what boundary's experiment is made with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from torch import nn
from torch.utils.data import TensorDataset

import kegfast
from kegfast.data.splits import Splits
from kegfast.distillation import Term, boundary, fitnets
from kegfast.experiments.trial import Trial, beginning
from kegfast.models import LeNet5
from kegfast.training import train
from kegfast.training.loop import mix

Loss = str | list[Term]

PAPER = [
    Term("hard_label"),
    # The paper's distillation terms lack soft_target's factor T^2.
    Term("soft_target", lambda done: boundary.soft_weight(done) / boundary.TEMPERATURE**2),
    Term("boundary", boundary.boundary_weight),
]
"""The loss of Heo et al. (2019)."""


class HalfLeNet5(nn.Sequential):
    """LeNet5 with half the channels: 3, 8 and 60, then 42."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool1 = nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.act2, self.pool2 = nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.act3, self.flat = nn.Conv2d(8, 60, 5), nn.ReLU(), nn.Flatten()
        self.fc1, self.act4, self.fc2 = nn.Linear(60, 42), nn.ReLU(), nn.Linear(42, 10)


class NormalisedLeNet5(nn.Sequential):
    """LeNet5 with BatchNorm behind each convolution."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 120, 5), nn.BatchNorm2d(120), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )


@dataclass(frozen=True)
class Budget:
    """How every network learns.

    Attributes:
        teacher_epochs: Passes of the teacher over the whole set.
        batch_size: Samples of a student's step.
        lr: First learning rate of the students' Adam.
    """

    teacher_epochs: int = 5
    batch_size: int = 128
    lr: float = 1e-3


TEACHERS = {"LeNet5": LeNet5, "LeNet5 with BatchNorm": NormalisedLeNet5}
"""The second's boundaries lie nearer to the samples."""


def teacher(trial: Trial, config: Budget, splits: Splits, name: str) -> Callable[[], nn.Module]:
    """Makes the teacher of this name when it is first asked for."""

    @cache
    def make() -> nn.Module:
        model = beginning(TEACHERS[name], 0)
        train(model, splits.train, epochs=config.teacher_epochs, **trial.resumed(name))
        return model.eval()

    return make


Config = TypeVar("Config", bound=Budget)


class Learning(Generic[Config]):
    """The students of one trial; all begin alike."""

    def __init__(self, trial: Trial, config: Config, splits: Splits, teacher: Callable[[], nn.Module]):
        self.trial, self.config, self.splits, self.teacher = trial, config, splits, teacher

    def student(self, name: str, loss: Loss, samples: TensorDataset, **options: Any) -> nn.Module:
        """A student of some samples; with `layers` it learns hints from these first."""
        student = beginning(HalfLeNet5, mix(self.trial.seed, 1))
        teach: Callable[..., object] = fitnets if "layers" in options else kegfast.distill
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
