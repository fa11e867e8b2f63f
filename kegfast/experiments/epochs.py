"""Students taught as the authors' program does: epochs over samples in one order, at a constant rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast.training.loop import MetricsLog, run_steps

EARLY = 5
"""Epochs in which students change the most."""


@dataclass(frozen=True)
class Epochs:
    """How long a student is taught, and how fast it learns.

    Attributes:
        rate: Adam's learning rate, from the first step to the last.
        most: epochs, of which each shows every sample once.
        least: epochs before which there is no end.
        patience: epochs in a row of which none is better, after which there is an end; None: to the last.
        batch_size: samples of a step.
        shuffle: whether each epoch has an order of its own; otherwise all have that of the samples.
        look: steps between two looks at the test set, which decide nothing. It is looked at after each of the
            first `EARLY` epochs too.
    """

    rate: float
    most: int
    least: int = 100
    patience: int | None = 50
    batch_size: int = 64
    shuffle: bool = False
    look: int = 2_500

    def steps(self, samples: int) -> int:
        """Of one epoch. Samples that do not fill the last batch are left out, as BatchNorm needs several."""
        return max(1, samples // self.batch_size)

    def within(self, steps: int, samples: int) -> int:
        """How many epochs there are at most if there are no more than so many steps."""
        return min(self.most, math.ceil(steps / self.steps(samples)))


class Closest:
    """The student as it was after its best epoch; part of a checkpoint.

    Args:
        student: the one that is being taught.
    """

    def __init__(self, student: nn.Module):
        self.student = student
        self.epoch, self.epochs, self.divergence = 0, 0, math.inf
        self.weights: dict[str, Tensor] = {}

    def note(self, divergence: float) -> None:
        """After every epoch: how far the student is from its teacher."""
        self.epochs += 1
        if divergence < self.divergence or not self.epoch:
            self.epoch, self.divergence = self.epochs, divergence
            self.weights = {name: value.clone() for name, value in self.student.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "student"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: state[name] for name in self.state_dict()})


@dataclass(frozen=True)
class Taught:
    """What came of it. The student itself is left as it was after its best epoch.

    Attributes:
        epoch: the best one.
        epochs: how many there were.
        curve: (steps, accuracy on the test set) as often as it was looked at.
    """

    epoch: int
    epochs: int
    curve: list[tuple[int, float]]


def teach(
    student: nn.Module,
    samples: Tensor,  # (n, ...)
    answers: Tensor,  # (n, classes)
    plan: Epochs,
    divergence: Callable[[nn.Module], float],
    accuracy: Callable[[nn.Module], float | None],
    *,
    most: int,
    seed: int = 0,
    amp: bool = False,
    checkpoint: Path | None = None,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    label: str = "student",
) -> Taught:
    """Teach a student in train mode to answer as its teacher: KL divergence at temperature 1, Adam.

    The best epoch is the one after which `divergence` is the least; it sees no real sample.

    Args:
        student: changed in place.
        samples: what it is shown, in the order in which it is shown.
        answers: the teacher's logits.
        plan: rate, batches, and when to end.
        divergence: of the student from the teacher, on other samples than these.
        accuracy: on the test set, where there is one.
        most: epochs at most.
        seed: of the orders, where epochs are shuffled.
        amp: compute in bfloat16 where torch's autocast deems it safe.
        checkpoint: file that a killed run goes on from, to the same result.
        metrics: log of every epoch.
        progress: show a bar with the time left.
        label: the name of the run.
    """
    steps = plan.steps(len(samples))
    shown = samples[: steps * plan.batch_size].contiguous(memory_format=_format(samples))
    wanted = answers[: len(shown)].softmax(1)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=plan.rate, fused=True)
    closest = Closest(student)
    look = max(1, plan.look // steps)

    def epoch(i: int) -> dict[str, Tensor | float]:
        student.train()
        x, p = shown, wanted
        if plan.shuffle:
            order = torch.randperm(len(x))
            x, p = x[order], p[order]
        total = torch.zeros(())
        for part, target in zip(x.split(plan.batch_size), p.split(plan.batch_size), strict=True):
            optimizer.zero_grad()
            with torch.autocast(part.device.type, torch.bfloat16, enabled=amp):
                logits = student(part)
            loss = F.kl_div(logits.float().log_softmax(1), target, reduction="batchmean")
            loss.backward()
            optimizer.step()
            total += loss.detach()
        found: dict[str, Tensor | float] = {"loss": total / steps, "divergence": divergence(student)}
        closest.note(float(found["divergence"]))
        looked = i < EARLY or (i + 1) % look == 0 or i + 1 == most
        right = accuracy(student) if looked else None
        return found if right is None else found | {"accuracy": right}

    def over() -> bool:
        idle = closest.epochs - closest.epoch
        return plan.patience is not None and closest.epochs >= plan.least and idle >= plan.patience

    history = run_steps(
        epoch,
        most,
        state={"student": student, "optimizer": optimizer, "closest": closest},
        seed=seed,
        checkpoint=checkpoint,
        resume=True,
        metrics=metrics,
        progress=progress,
        label=label,
        log_every=1,
        until=over,
    )
    student.load_state_dict(closest.weights)
    student.eval()
    curve = [(int(e["step"]) * steps, e["accuracy"]) for e in history if "accuracy" in e]
    return Taught(closest.epoch, closest.epochs, curve)


def _format(samples: Tensor) -> torch.memory_format:
    """Channels last for images: what convolutions are fastest with."""
    return torch.channels_last if samples.dim() == 4 else torch.contiguous_format
