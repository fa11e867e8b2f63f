"""Five networks and the one student that learns from all of them: a part of Hinton's experiment."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from kegfast.distillation import Ensemble, InMemory
from kegfast.experiments.perceptrons import Budget, Learning
from kegfast.experiments.trial import part
from kegfast.training.loop import mix


@dataclass(frozen=True)
class Config(Budget):
    """What the results depend on.

    As in bagging, each member learns from its own draw. Networks that differ in their first weights alone
    gain so little together that no share of it can be measured on 10,000 images.

    Attributes:
        share: Part of the training set that each member learns from.
        members: Networks of the ensemble.
        units: Width of their two hidden layers, and of their student's.
        member_epochs: Passes of each of them over its part.
        student_steps: Of the student, which sees the images of all members and none of the labels.
    """

    amp: bool = False
    share: float = 0.1
    members: int = 5
    units: int = 100
    member_epochs: int = 60
    student_steps: int = 8000


class Run(Learning[Config]):
    """All cells of one seed."""

    def all(self) -> dict[str, float]:
        """Test errors of one network (the members' mean), of all together, of their student."""
        config, numbers = self.config, range(1, self.config.members + 1)
        parts = {n: part(self.splits.train, config.share, mix(self.trial.seed, n)) for n in numbers}

        @cache
        def member(number: int) -> nn.Module:
            network, epochs = self.beginning(config.units, number), config.member_epochs
            return self.trained(f"member {number}", network, epochs, parts[number])

        @cache
        def together() -> nn.Module:
            return Ensemble([member(number) for number in numbers], temperature=config.temperature)

        def student(name: str) -> nn.Module:
            source = InMemory(torch.cat([samples.tensors[0] for samples in parts.values()]))
            return self.taught(name, self.beginning(config.units), together(), config.student_steps, source)

        def one(number: int) -> Callable[[str], nn.Module]:
            return lambda name: member(number)

        errors = [self.errors(f"member {number}", one(number)) for number in numbers]
        return {
            "one network": sum(errors) / len(errors),
            "ensemble": self.errors("ensemble", lambda name: together()),
            "distilled from the ensemble": self.errors("distilled from the ensemble", student),
        }
