"""Distillation in several runs: hints first, or student after student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.distillation.distiller import distill
from kegfast.training.loop import seeded


def fitnets(
    student: nn.Module,
    teacher: nn.Module,
    source: Any,
    *,
    layers: str,
    hint_steps: int = 1000,
    loss: str = "soft_target",
    checkpoint: str | Path | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the student's lower half on a hint, then all of it (FitNets: Romero et al. 2015, section 2.3).

    Args:
        student: Trained in place.
        teacher: The model to learn from.
        source: As for `distill`.
        layers: The pair of layers, `"student path=teacher path"`, or one path for both.
        hint_steps: Steps of the first stage, which changes only what lies below the student's layer.
        loss: Of the second stage.
        checkpoint: A file; the first stage's has ".hint" in its name.
        **options: `distill`'s, for both stages; `steps` is the second's.

    Returns:
        The second stage's history.
    """
    check.count("hint_steps", hint_steps)
    first = _variant(checkpoint, "hint")
    stage = {**options, "steps": hint_steps, "label": "hint"}
    distill(student, teacher, source, loss=f"hint@{layers}", checkpoint=first, **stage)
    return distill(student, teacher, source, loss=loss, checkpoint=checkpoint, **options)


def born_again(
    make_student: Callable[[], nn.Module],
    teacher: nn.Module,
    source: Any,
    *,
    generations: int = 3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> list[nn.Module]:
    """Teach a student, let it teach the next, and so on (Furlanello et al. 2018).

    Args:
        make_student: Builds an untrained student, in the paper of the teacher's own architecture.
        teacher: The first teacher.
        source: As for `distill`.
        generations: How many students.
        seed: Generation g is built and distilled from `seed + g`.
        checkpoint: A file; each generation's has its number in its name.
        **options: `distill`'s. The paper uses temperature 1 and mixes in the labels.

    Returns:
        The students, in order; `Ensemble(students)` is the paper's BANE.
    """
    check.count("generations", generations)
    check.seed("seed", seed)
    if not callable(make_student):
        raise TypeError(expected("make_student", "a function to an untrained student", make_student))
    students = []
    for generation in range(generations):
        with seeded(seed + generation):
            student = make_student()
        own = _variant(checkpoint, str(generation))
        distill(student, teacher, source, seed=seed + generation, checkpoint=own, **options)
        students.append(student)
        teacher = student
    return students


def _variant(checkpoint: str | Path | None, tag: str) -> Path | None:
    """run.pt -> run.tag.pt"""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.{tag}{path.suffix}")
