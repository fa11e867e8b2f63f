"""Five networks and the one student that learns from all of them: a part of Hinton's experiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from kegfast.data.splits import Splits
from kegfast.distillation import Ensemble, Noisy
from kegfast.experiments.perceptrons import Budget, Learning
from kegfast.experiments.trial import spreads, trials


@dataclass(frozen=True)
class Config(Budget):
    """What the results depend on.

    Attributes:
        members: Networks of the ensemble.
        units: Width of their two hidden layers, and of their student's.
        member_epochs: Passes of each of them over the training set.
        student_epochs: Passes of the student, in steps.
        noise: Deviation of what is added to the images that it sees.
    """

    members: int = 5
    units: int = 100
    member_epochs: int = 40
    student_epochs: int = 40
    noise: float = 0.3


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

        @cache
        def member(number: int) -> nn.Module:
            network = self.beginning(config.units, number)
            return self.trained(f"member {number}", network, config.member_epochs)

        @cache
        def together() -> nn.Module:
            return Ensemble([member(number) for number in numbers], temperature=config.temperature)

        def student(name: str) -> nn.Module:
            source = Noisy(self.transfer_set(), config.noise)
            beginner = self.beginning(config.units)
            return self.taught(name, beginner, together(), config.student_epochs, source)

        errors = [self.errors(f"member {number}", lambda name, n=number: member(n)) for number in numbers]
        return {
            "one network": sum(errors) / len(errors),
            "ensemble": self.errors("ensemble", lambda name: together()),
            "distilled from the ensemble": self.errors("distilled from the ensemble", student),
        }
