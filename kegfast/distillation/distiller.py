"""The training loop of every student: `kegfast.distill`."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.inputs import Inputs, move, take, tensors_in
from kegfast._util.modules import modes_kept
from kegfast.distillation.batch import Batch
from kegfast.distillation.hooks import Features
from kegfast.distillation.models import Asked, as_teacher, check_apart, place, set_modes
from kegfast.distillation.objective import Objective, Term
from kegfast.distillation.sources import InMemory, as_source
from kegfast.training.finite import Given
from kegfast.training.loop import MetricsLog, mix, run_steps, seeded
from kegfast.training.optimizers import MakeOptimizer, OptimizerName, make_optimizer


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    source: Any,
    *,
    loss: str | Callable[..., Tensor] | Sequence[Term] = "soft_target",
    steps: int = 1000,
    batch_size: int = 128,
    optimizer: OptimizerName | MakeOptimizer = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Literal["cosine", "constant"] | Callable[[float], float] = "cosine",
    temperature: float = 4.0,
    alpha: float = 1.0,
    student_batchnorm: Literal["train", "eval"] = "train",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    amp: bool = False,
    log_every: int = 10,
    label: str = "distill",
) -> list[dict[str, float]]:
    """Train a student to answer as a teacher does, on whatever samples there are.

    The teacher runs in eval mode without gradients. No step waits for the device, except for the loss
    read every `log_every` steps. Both models' modes (train or eval) are restored at the end.

    Args:
        student: Trained in place. Wrap it in `DistributedDataParallel` to train on several
            processes: each draws samples of its own.
        teacher: A model, or several, whose softened probabilities are then averaged (`Ensemble`).
        source: A `Generators`, noise, a `Pool` of either (the teacher then answers once per sample, not
            per step), a tensor, a data set or a DataLoader; see `kegfast.distillation.sources`.
        loss: Text such as `"soft_target+rkd_distance:25"` or `"hint@layers2:0.5"`
            (`kegfast.distillation.objective`), a function of (student logits, teacher
            logits, labels), or a list of `Term`.
        steps: How many batches.
        batch_size: Samples per step and process.
        optimizer: A name, or a function from the list of parameters to a torch optimizer, which then
            has its own rates. "sgd" has a Nesterov momentum of 0.9.
        lr: The first learning rate. 1e-3 suits Adam from scratch; a compressed student on samples
            far from real ones keeps more with 1e-5 to 1e-4.
        weight_decay: As torch's optimizers define it.
        schedule: "cosine" takes the rate down to zero, "constant" leaves it; or a function from the
            share of the run that is done, in [0, 1), to a factor.
        temperature: For losses that soften logits.
        alpha: Weight of `soft_target`'s soft part; `1 - alpha` goes to the source's labels.
        student_batchnorm: "eval" keeps the student's running statistics, and normalizes with them:
            right for samples whose statistics are not the data's, such as noise. Layers whose parameters
            ask for no gradient keep theirs in any case.
        seed: Seed of all draws.
        checkpoint: File that a stopped run continues from.
        resume: Continue from `checkpoint` where it exists, to the same result.
        metrics: Log of the losses.
        progress: Show a bar on a terminal.
        device: Move both models there first; by default both must be on one device already.
        amp: Run both models under bfloat16 autocast; losses stay in float32.
        log_every: Steps between two entries of the history.
        label: The stage's name in the log and the checkpoint.

    Returns:
        The history: one dict per `log_every` steps with "step", "loss" and, if there are
        several, each term's value.

    Raises:
        ValueError: An argument is out of its range, the models are on different devices, or their
            outputs do not fit the losses.
        TypeError: An argument has the wrong type.
        FloatingPointError: The loss is no longer finite.

    Example:
        >>> from kegfast.distillation import Mixture, Pool
        >>> generators = kegfast.Generators.load("generators.safetensors")
        >>> source = Pool(Mixture([generators, unlabeled_images], weights=[3, 1]), 50_000)
        >>> kegfast.distill(student, teacher, source, loss="soft_target+rkd_distance:25", steps=5_000)
    """
    check.counts(steps=steps, batch_size=batch_size, log_every=log_every)
    seed = check.seed("seed", seed)
    teacher = as_teacher(teacher, temperature)
    device = place(student, teacher, device)
    source = as_source(source)
    objective = Objective(loss, temperature=temperature, alpha=alpha)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    ask_student, ask_teacher, given = Asked("student", student), Asked("teacher", teacher), Given()
    with ExitStack() as stack:
        stack.enter_context(modes_kept(student, teacher))
        student.eval()
        teacher.eval()
        ours = stack.enter_context(Features(student, objective.student_layers))
        theirs = stack.enter_context(Features(teacher, objective.teacher_layers))
        _fit_regressors(objective, ask_student, ask_teacher, source, ours, theirs, device, seed)
        set_modes(student, teacher, student_batchnorm)
        check_apart(student, teacher)
        draw = _drawer(source, ask_teacher, objective, device, autocast, steps * batch_size)
        trainable = check.trained("student", student, objective)
        updates = make_optimizer(optimizer, trainable, lr=lr, weight_decay=weight_decay, fused=True)
        rates = [group["lr"] for group in updates.param_groups]
        factor, aside = _factor(schedule), ask_student.aside()

        def step(i: int) -> dict[str, Tensor]:
            for group, rate in zip(updates.param_groups, rates, strict=True):
                group["lr"] = rate * factor(i / steps)
            samples, labels, answers = draw(batch_size)
            given.note("source", *tensors_in(samples))
            given.note("teacher", answers)
            with autocast:
                logits = ask_student.on(samples)
            batch = Batch(samples, labels, logits, answers, ours.taken(), theirs.taken(), aside, ask_teacher)
            values = objective(batch, i / steps)
            check.depends("student", logits)
            check.depends("loss", values["loss"])
            updates.zero_grad()
            values["loss"].backward()
            updates.step()
            return {name: value.detach() for name, value in values.items()}

        return run_steps(
            step,
            steps,
            state={"student": student, "objective": objective, "optimizer": updates},
            given=given,
            seed=_own_seed(seed),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            resume=resume,
            metrics=metrics,
            progress=progress,
            label=label,
            log_every=log_every,
        )


def _drawer(
    source: Any,
    ask: Asked,
    objective: Objective,
    device: torch.device,
    autocast: torch.autocast,
    draws: int,
) -> Callable[[int], tuple[Inputs, Tensor | None, Tensor]]:
    """A function that gives n samples, their labels and the teacher's logits, on the device.

    Where fewer samples are in memory than will be drawn, the teacher answers to all of them at once.
    """

    def to_device(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else labels.to(device, non_blocking=True)

    def draw_and_ask(n: int) -> tuple[Inputs, Tensor | None, Tensor]:
        with torch.no_grad():  # a source may be a network
            samples, labels = source.sample(n)
            samples = move(samples, device)
            with autocast:
                return samples, to_device(labels), ask.on(samples)

    if not isinstance(source, InMemory) or objective.needs_teacher or len(source) > draws:
        return draw_and_ask
    answers = ask.logits(source.answers(ask.model, device))

    def look_up(n: int) -> tuple[Inputs, Tensor | None, Tensor]:
        index = source.draw(n)
        labels = None if source.labels is None else source.labels[index]
        return (
            move(take(source.samples, index), device),
            to_device(labels),
            answers[index].to(device, non_blocking=True),
        )

    return look_up


def _fit_regressors(
    objective: Objective,
    student: Asked,
    teacher: Asked,
    source: Any,
    ours: Features,
    theirs: Features,
    device: torch.device,
    seed: int,
) -> None:
    """Show both models two samples, and create what their features' shapes ask for."""
    if not objective.student_layers:
        return
    with seeded(mix(seed, -1)), torch.no_grad():
        samples = move(source.sample(2)[0], device)
        student.on(samples)
        teacher.on(samples)
        objective.fit(ours.taken(), theirs.taken())
    if isinstance(student.model, DistributedDataParallel):
        objective.parallelize()


def _own_seed(seed: int) -> int:
    """One seed per process, so that each draws samples of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return mix(seed, torch.distributed.get_rank())
    return seed


def _factor(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    if schedule == "cosine":
        return lambda done: 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "constant":
        return lambda done: 1.0
    raise ValueError(expected("schedule", "'cosine', 'constant' or a function", schedule))
