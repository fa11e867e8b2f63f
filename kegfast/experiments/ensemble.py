"""Five networks and the one student that learns from all of them: a part of Hinton's experiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from kegfast.data.splits import Splits
from kegfast.distillation import Augmented, Ensemble
from kegfast.experiments.perceptrons import Budget, Learning
from kegfast.experiments.trial import part, spreads, trials


@dataclass(frozen=True)
class Config(Budget):
    """What the results depend on.

    With all of the training set five such networks gain too little on one for a share of it to be measured.

    Attributes:
        share: Part of the training set that the members learn from; their student sees no other image.
        members: Networks of the ensemble.
        units: Width of their two hidden layers, and of their student's.
        member_epochs: Passes of each of them over their part.
        student_steps: Of the student, on blends of two images each.
    """

    amp: bool = False
    share: float = 0.1
    members: int = 5
    units: int = 100
    member_epochs: int = 100
    student_steps: int = 4000


def run(
    output: str | Path, seeds: Sequence[int], config: Config, splits: Splits, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Test errors of one network (the members' mean), of all together, of their student; over the seeds."""
    runs = trials(output, "ensemble", seeds, config, progress)
    return spreads([_Run(trial, config, splits).all() for trial in runs])


class _Run(Learning):
    """All cells of one seed."""

    def all(self) -> dict[str, float]:
        config, numbers = self.config, range(1, self.config.members + 1)
        samples = part(self.splits.train, config.share, self.trial.seed)

        @cache
        def member(number: int) -> nn.Module:
            network = self.beginning(config.units, number)
            return self.trained(f"member {number}", network, config.member_epochs, samples)

        @cache
        def together() -> nn.Module:
            return Ensemble([member(number) for number in numbers], temperature=config.temperature)

        def student(name: str) -> nn.Module:
            source = Augmented(samples, blend)
            return self.taught(name, self.beginning(config.units), together(), config.student_steps, source)

        errors = [self.errors(f"member {number}", lambda name, n=number: member(n)) for number in numbers]
        return {
            "one network": sum(errors) / len(errors),
            "ensemble": self.errors("ensemble", lambda name: together()),
            "distilled from the ensemble": self.errors("distilled from the ensemble", student),
        }


def blend(images: Tensor) -> Tensor:  # (N, ...)
    """Each image mixed with another of the batch, by shares of its own: inputs that no label is known for.

    Bucila, Caruana and Niculescu-Mizil (2006) label invented data with the ensemble; Beyer et al. (2022, "A
    good teacher is patient and consistent") show that such blends serve a student that matches a function.
    """
    share = torch.rand(len(images), *[1] * (images.ndim - 1))
    return share * images + (1 - share) * images[torch.randperm(len(images))]
