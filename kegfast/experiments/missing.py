"""Students that never see some classes: a part of Hinton's experiment."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kegfast.data.splits import Splits
from kegfast.experiments.perceptrons import CLASSES, Budget, Learning, logits, wrong
from kegfast.experiments.trial import Trial

KEPT = {"without 3": [0, 1, 2, 4, 5, 6, 7, 8, 9], "7 and 8 only": [7, 8]}
"""Classes of the transfer sets, as in the paper."""


@dataclass(frozen=True)
class Config(Budget):
    """What the results depend on.

    Attributes:
        temperature: The paper's: what is known of an absent class lies in small probabilities.
        units: Width of the student's two hidden layers, as in the paper.
        epochs: Its steps, as passes over the whole training set.
    """

    temperature: float = 20.0
    units: int = 800
    epochs: int = 15


class Run(Learning[Config]):
    """All cells of one seed."""

    def __init__(self, trial: Trial, config: Config, splits: Splits, teacher: Callable[[], nn.Module]):
        super().__init__(trial, config, splits)
        self.teacher = teacher

    def all(self) -> dict[str, float]:
        """Test errors and shares of the missing classes."""
        found: dict[str, float] = {}
        for name, kept in KEPT.items():
            part = self.trial.cell(name, partial(self._errors, name, kept))
            found |= {f"{name}: {key}": value for key, value in part.items()}
        return found

    def _errors(self, name: str, kept: list[int]) -> dict[str, float]:
        """Errors of a student that never saw some classes, before and after moving their biases.

        The paper shifts the biases of what was shown too often or never by what serves the test set
        best; here the shift makes these classes as frequent among the unlabeled validation images as
        the teacher finds them.
        """
        beginner, steps = self.beginning(self.config.units), self.steps(self.config.epochs)
        student = self.taught(name, beginner, self.teacher(), steps, self.transfer_set(kept))
        absent = [k for k in range(CLASSES) if k not in kept]
        moved = min(kept, absent, key=len)
        images = self.splits.val.tensors[0]
        shift = _balance(logits(student, images), logits(self.teacher(), images), moved)
        samples, labels = self.splits.test.tensors
        answers = logits(student, samples)
        found = {"errors": wrong(answers, labels)}
        answers = answers + shift * _columns(moved)
        mine = torch.isin(labels, torch.tensor(moved))
        right = float((answers.argmax(dim=1) == labels)[mine].float().mean())
        return {
            **found,
            "errors after the shift": wrong(answers, labels),
            "percent right of the moved classes": 100 * right,
            "shift": shift,
        }


def _balance(student: Tensor, teacher: Tensor, classes: list[int]) -> float:
    """The bias that lets the student choose these classes as often as the teacher does."""
    columns = _columns(classes)
    often = int(torch.isin(teacher.argmax(dim=1), torch.tensor(classes)).sum())
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        chosen = (student + middle * columns).argmax(dim=1)
        if int(torch.isin(chosen, torch.tensor(classes)).sum()) < often:
            low = middle
        else:
            high = middle
    return high


def _columns(classes: list[int]) -> Tensor:  # (C,)
    """1 for these classes, 0 for the others."""
    return torch.zeros(CLASSES).index_fill_(0, torch.tensor(classes), 1.0)
