"""How a compressed student is taught, by what the network is."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast._util.inputs import tensors_in
from kegfast._util.modules import channels_last, evaluation
from kegfast.compression.surgery import factored_layers
from kegfast.distillation import distill
from kegfast.distillation.hooks import Features
from kegfast.distillation.sources import InMemory
from kegfast.recovery.subject import Subject

BATCH = 128
"""Samples of a step, of up to `NUMBERS` numbers in all; larger ones are fewer, down to 16."""
NUMBERS = 1 << 19
HINT = 2.0
"""Weight of half the squared error of each block's features, in units of their own variance."""
LOOK = 128
"""Samples that tell that variance."""


@dataclass(frozen=True)
class Lesson:
    """One course of Adam whose rate a cosine leads to zero.

    Attributes:
        rate: the learning rate at its start.
        steps: of `batch` samples.
        batchnorm: the mode of the student's BatchNorm layers; see `kegfast.distill`.
        hints: whether the blocks are taught the teacher's features beside its logits.
        batch: samples of a step.
    """

    rate: float
    steps: int
    batchnorm: Literal["train", "eval"]
    hints: bool = False
    batch: int = BATCH

    def __str__(self) -> str:
        text = f"{self.steps} steps of {self.batch} samples, learning rate {self.rate:g}"
        text += ", block by block too" if self.hints else ""
        return text + (", BatchNorm's statistics held" if self.batchnorm == "eval" else "")


STRUCTURED = Lesson(2e-3, 2_000, "train")
"""For images without BatchNorm in the network: a student cannot learn too much from several kinds of them."""
GENTLE = Lesson(5e-4, 50, "eval", hints=True)
"""For matched images and a student that is close to its teacher: less is to be learnt than forgotten, and
artificial images would move BatchNorm's statistics. The teacher's logits say little about a block on images
that look like no class, so that blocks are taught one by one."""
THOROUGH = Lesson(2e-3, 600, "train", hints=True)
"""For one that is far from it: there the statistics must follow the weights."""
TABULAR = Lesson(1e-3, 6_000, "train")
"""For rows, where noise is not far from data."""


def lessons(subject: Subject) -> tuple[Lesson, ...]:
    """The courses that may suit students of a network, each from the start; the more steps, the later."""
    if subject.kind == "row":
        return (TABULAR,)
    batch = max(16, min(BATCH, NUMBERS // subject.numbers))
    plans = (GENTLE, THOROUGH) if subject.has_norms else (STRUCTURED,)
    return tuple(replace(plan, batch=batch) for plan in plans)


def objective(subject: Subject, student: nn.Module, samples: Tensor) -> str:
    """The loss of students whose blocks are taught the teacher's features beside its logits.

    Args:
        subject: the teacher.
        student: made of it.
        samples: such as it will be taught with, on which the features' variances are measured.
    """
    prefix = "model." if subject.probabilities else ""
    names = blocks(subject, student)
    sizes = _variances(subject.model, names, samples[:LOOK])
    hints = [f"hint@{prefix}{name}:{HINT / sizes[name]:.6g}" for name in names if sizes[name] > 0]
    return " + ".join(["soft_target", *hints])


@torch.no_grad()
def _variances(model: nn.Module, names: Sequence[str], samples: Tensor) -> dict[str, float]:
    with evaluation(model), Features(model, names) as features:
        model(samples)
        return {name: float(x.float().var()) for name, x in features.taken().items()}


def blocks(subject: Subject, student: nn.Module) -> list[str]:
    """The parts of a network that hold factored layers and put out one tensor, of one shape in both."""
    parents = {name.rpartition(".")[0] for name, _ in factored_layers(student)} - {""}
    names = [name for name, _ in subject.model.named_modules() if name in parents]
    ours, theirs = (_shapes(subject, model, names) for model in (student, subject.model))
    return [name for name in names if ours.get(name) and ours[name] == theirs.get(name)]


def _shapes(subject: Subject, model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...] | None]:
    """Of the outputs of modules that run once and put out one tensor; None for others."""
    seen: dict[str, tuple[int, ...] | None] = {}

    def note(name: str, module: nn.Module, args: Any, out: Any) -> None:
        seen[name] = tuple(out.shape) if isinstance(out, Tensor) and name not in seen else None

    x = torch.zeros(2, *subject.sample_shape).to(next(model.parameters()))
    with evaluation(model), ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(note, name)).remove)
        model(x)
    return seen


def teach(subject: Subject, student: nn.Module, pool: InMemory, plan: Lesson, **options: Any) -> None:
    """Teaches a student, in place, what the teacher answers to a pool; options are `kegfast.distill`'s."""
    shown = next(iter(tensors_in(pool.samples)))
    loss = objective(subject, student, shown) if plan.hints else "soft_target"
    channels_last(student)
    distill(
        subject.logits(student),
        subject.teacher,
        pool,
        loss=loss,
        steps=plan.steps,
        batch_size=plan.batch,
        lr=plan.rate,
        temperature=1.0,
        student_batchnorm=plan.batchnorm,
        **options,
    )
