"""How a compressed student is taught, by what the network is."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast.compression.surgery import factored_layers
from kegfast.compression.traffic import evaluation
from kegfast.distillation import distill
from kegfast.distillation.features import Features
from kegfast.distillation.sources import InMemory
from kegfast.recovery.subject import Subject

BATCH = 128
"""Samples of a step, of up to `NUMBERS` numbers in all; larger ones are fewer, down to 16."""
NUMBERS = 1 << 19
HINT = 2.5
"""Weight of each block's features beside the logits."""


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


STRUCTURED = Lesson(2e-3, 2_000, "train")
"""For images without BatchNorm in the network: a student cannot learn too much from several kinds of them."""
FINE = Lesson(5e-4, 50, "eval", hints=True)
"""For matched images: less is to be learnt than forgotten. The statistics of BatchNorm are nearly the teacher's,
and artificial images would move them. The teacher's logits say little about a block on images that look like no
class, so that blocks are taught one by one."""
TABULAR = Lesson(1e-3, 6_000, "train")
"""For rows, where noise is not far from data."""


def lesson(subject: Subject) -> Lesson:
    """What suits students of a network."""
    if subject.kind == "row":
        return TABULAR
    plan = FINE if subject.has_norms else STRUCTURED
    return replace(plan, batch=max(16, min(BATCH, NUMBERS // subject.numbers)))


def blocks(subject: Subject, student: nn.Module) -> list[str]:
    """The parts of a network that hold factored layers and have one tensor, of one shape in both, as output."""
    parents = {name.rpartition(".")[0] for name, _ in factored_layers(student)} - {""}
    names = [name for name, _ in subject.model.named_modules() if name in parents]
    x = torch.zeros(2, *subject.sample_shape, device=subject.device)
    shapes: list[dict[str, Any]] = []
    for model in (subject.model, student):
        seen: dict[str, Any] = {}
        with evaluation(model), ExitStack() as stack, torch.no_grad():
            for name in names:

                def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                    seen[name] = tuple(out.shape) if isinstance(out, Tensor) and name not in seen else None

                stack.callback(model.get_submodule(name).register_forward_hook(note).remove)
            model(x.to(next(model.parameters())))
        shapes.append(seen)
    return [name for name in names if shapes[0].get(name) and shapes[0][name] == shapes[1].get(name)]


def teach(subject: Subject, student: nn.Module, pool: InMemory, plan: Lesson, **options: Any) -> None:
    """Teaches a student, in place, from what the teacher answers to a pool; see `kegfast.distill` for options."""
    loss = "soft_target"
    if plan.hints and (names := blocks(subject, student)):
        prefix = "model." if subject.probabilities else ""
        loss += f" + hint@{','.join(prefix + name for name in names)}:{HINT:g}"
    student.to(memory_format=torch.channels_last)
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
