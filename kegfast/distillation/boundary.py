"""Boundary supporting samples: teach a student where the teacher's classes meet (Heo et al. 2019).

"Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI 2019. The step divides
by the squared norm of the gradient, as in the paper, so that eta = 1 is Newton's step; the
authors' code (bhheo/BSS_distillation) divides by the norm and takes eta = 0.3. Epsilon (1e-4) and the 64
samples of a batch are that code's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.logits import two_classes
from kegfast.distillation.batch import Batch
from kegfast.distillation.logit import UNLABELED, check_labels, soft_target

TEMPERATURE = 3.0
"""The paper's, for its distillation terms."""


class BoundarySamples(NamedTuple):
    """What `boundary_samples` found, one row per base sample."""

    index: Tensor  # type: ignore[assignment]  # hides tuple's method of that name
    """(N,) int64, positions of the base samples in the batch."""
    samples: Tensor
    """(N, ...), the moved samples, wherever their search ended."""
    base: Tensor
    """(N,) int64, the class each started in."""
    target: Tensor
    """(N,) int64, the class it was sent to."""
    accepted: Tensor
    """(N,) bool, whether it crossed into its target's side of the boundary."""


def boundary_samples(
    teacher: Callable[[Tensor], Tensor],
    samples: Tensor,  # (B, ...)
    labels: Tensor | None = None,  # (B,)
    *,
    teacher_logits: Tensor | None = None,  # (B, C)
    student_logits: Tensor | None = None,  # (B, C)
    count: int = 64,
    steps: int = 10,
    eta: float = 1.0,
    epsilon: float = 1e-4,
    bounds: tuple[float, float] | None = None,
) -> BoundarySamples:
    """Move samples just across the teacher's decision boundary.

    Base samples are those that teacher and student both classify right; of these the `count` with the
    largest `sum_k (p_teacher,k - p_student,k)^2` over the classes k other than the label. A target class is
    drawn by the teacher's probabilities over the other classes. With `L(x) = f_b(x) - f_k(x)`, the
    logits of base and target class, `x <- x - eta (L(x) + epsilon) / |grad L|^2 grad L`
    until the class is no longer b: accepted if it is k then, rejected if it is another or
    after `steps` steps. All samples move at once.

    Args:
        teacher: A model in eval mode, to logits, that gradients pass; a sample's logits must depend on that
            sample alone.
        samples: The batch, (B, ...).
        labels: Classes, (B,); the teacher's own where missing or -100.
        teacher_logits: `teacher(samples)` where already known, (B, C).
        student_logits: The student's, (B, C). Without them base samples are the first that the
            teacher classifies right, as when two models' boundaries are measured.
        count: N, the most base samples.
        steps: The most moves of a sample.
        eta: Step size, above 0. 1 crosses the boundary of a linear teacher in one step.
        epsilon: Added to L so that the step does not die at the boundary, above 0.
        bounds: Range to which values are clamped; none when None.

    Returns:
        Up to `count` rows, possibly none. Nothing in it carries gradients.

    Raises:
        TypeError, ValueError: An argument is wrong, or samples, labels and logits do not fit each other.
    """
    _check(samples, count, steps, eta, epsilon, bounds)
    if teacher_logits is None:
        with torch.no_grad(), check.accepts("samples", samples, "teacher"):
            teacher_logits = teacher(samples)
    check.batches(2, 0, samples=samples, teacher_logits=teacher_logits)
    if student_logits is not None and student_logits.shape != teacher_logits.shape:
        raise ValueError(expected("student_logits", "of the teacher's shape", student_logits))
    teacher_logits = two_classes(teacher_logits.detach())
    student_logits = None if student_logits is None else two_classes(student_logits)
    labels = _known(labels, teacher_logits)
    index = _base_samples(teacher_logits, student_logits, labels, count)
    base = labels[index]
    target = _draw_targets(teacher_logits[index], base)
    moved, accepted = _search("teacher", teacher, samples[index], base, target, steps, eta, epsilon, bounds)
    return BoundarySamples(index, moved, base, target, accepted)


def boundary_loss(batch: Batch) -> Tensor:
    """KL(teacher || student) at temperature 3 on the batch's accepted boundary samples, their mean.

    The paper's third term; like the paper it leaves out the factor T^2. It is 0 with fewer than two
    samples, of which BatchNorm could not take statistics.
    """
    if batch.ask_teacher is None or batch.ask_student is None or not isinstance(batch.samples, Tensor):
        raise TypeError(expected("batch", "of one tensor of samples, with both models to ask", batch.samples))
    found = boundary_samples(
        batch.ask_teacher,
        batch.samples,
        batch.labels,
        teacher_logits=batch.teacher,
        student_logits=batch.student.detach(),
    )
    samples = found.samples[found.accepted]
    if len(samples) < 2:
        return batch.student.sum() * 0.0
    with torch.no_grad():
        teacher = batch.ask_teacher(samples)
    # Other processes may have no such sample; DistributedDataParallel averages the gradients all the same.
    student = batch.ask_student(samples)
    return soft_target(student, teacher, temperature=TEMPERATURE) / TEMPERATURE**2


def boundary_weight(done: float) -> float:
    """The paper's schedule of that term: from 2 down to 0 at three quarters of the run."""
    return max(0.0, 2 * (1 - 4 / 3 * done))


def soft_weight(done: float) -> float:
    """The paper's schedule of the term on the samples themselves: from 4 to 1."""
    return 1 + 3 * (1 - done)


def perturbations(
    model: Callable[[Tensor], Tensor],
    samples: Tensor,  # (B, ...)
    labels: Tensor,  # (B,)
    targets: Tensor,  # (B,)
    *,
    steps: int = 10,
    eta: float = 1.0,
    epsilon: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """The vectors from samples to a model's boundary with the given target classes.

    Args:
        model: In eval mode, to logits, with gradients to its input.
        samples: Samples that the model puts into `labels`.
        labels: The classes to leave.
        targets: The classes to reach.
        steps: As for `boundary_samples`; likewise `eta` and `epsilon`.

    Returns:
        Vectors (B, ...), and whether each reached its target (B,) bool.

    Raises:
        TypeError, ValueError: An argument is wrong, or samples, labels and targets do not fit each other.
    """
    _check(samples, 1, steps, eta, epsilon)
    with torch.no_grad(), check.accepts("samples", samples, "model"):
        logits = two_classes(model(samples))
    for name, classes in (("labels", labels), ("targets", targets)):
        check_labels(classes, logits, name)
        if (classes == UNLABELED).any():
            raise ValueError(expected(name, "the class of each sample", UNLABELED))
    moved, accepted = _search("model", model, samples, labels, targets, steps, eta, epsilon, None)
    return moved - samples, accepted


def magnitude_similarity(
    first: Tensor,  # (N, ...)
    second: Tensor,  # (N, ...)
) -> Tensor:
    """How alike two models' distances to the boundary are: the mean of min / max of the norms, in [0, 1].

    Args:
        first: (N, ...) vectors from samples across one model's boundary, as `perturbations` gives them.
        second: The same of the other model, for the same samples.
    """
    first, second = _vectors(first, second)
    norms = torch.stack([first.norm(dim=1), second.norm(dim=1)])
    largest = norms.amax(dim=0)
    return torch.where(largest > 0, norms.amin(dim=0) / largest, 1.0).mean()


def angle_similarity(
    first: Tensor,  # (N, ...)
    second: Tensor,  # (N, ...)
) -> Tensor:
    """How alike two models' directions to the boundary are: the mean of (cos + 1) / 2, in [0, 1].

    1 is one direction, 1/2 a right angle, 0 opposite directions; a zero vector counts as 1/2.

    Args:
        first: (N, ...) vectors from samples across one model's boundary, as `perturbations` gives them.
        second: The same of the other model, for the same samples.
    """
    first, second = _vectors(first, second)
    cosine = torch.cosine_similarity(first, second, dim=1).clamp(-1, 1)
    return ((cosine + 1) / 2).mean()


def _known(labels: Tensor | None, teacher_logits: Tensor) -> Tensor:
    own = teacher_logits.argmax(dim=1)
    if labels is not None:
        check_labels(labels, teacher_logits)
    return own if labels is None else torch.where(labels == UNLABELED, own, labels)


def _base_samples(
    teacher: Tensor,  # (B, C)
    student: Tensor | None,  # (B, C)
    labels: Tensor,  # (B,)
    count: int,
) -> Tensor:  # (N,)
    right = teacher.argmax(dim=1) == labels
    if student is None:
        return right.nonzero().flatten()[:count]
    right &= student.argmax(dim=1) == labels
    difference = (teacher.float().softmax(dim=1) - student.float().softmax(dim=1)).square()
    score = difference.sum(dim=1) - difference.gather(1, labels.unsqueeze(1)).flatten()
    score = score.masked_fill(~right, -1.0)
    order = score.topk(min(count, len(score))).indices
    return order[right[order]]


def _draw_targets(
    teacher: Tensor,  # (N, C)
    base: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """A class other than the base, by the teacher's probabilities."""
    others = teacher.float().scatter(1, base.unsqueeze(1), float("-inf"))
    return torch.multinomial(others.softmax(dim=1), 1).flatten()


def _search(
    name: str,
    teacher: Callable[[Tensor], Tensor],
    start: Tensor,  # (N, ...)
    base: Tensor,  # (N,)
    target: Tensor,  # (N,)
    steps: int,
    eta: float,
    epsilon: float,
    bounds: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:  # (N, ...), (N,) bool
    moved = start.detach().clone()
    accepted = torch.zeros_like(base, dtype=torch.bool)
    active = torch.arange(len(moved), device=moved.device)  # those still in their base class
    for step in range(steps + 1):
        if len(active) == 0:
            break
        gap, slope, answer = _gap(name, teacher, moved[active], base[active], target[active])
        accepted[active] = answer == target[active]
        inside = answer == base[active]
        active, gap, slope = active[inside], gap[inside], slope[inside]
        if step < steps:
            squared = slope.flatten(1).square().sum(dim=1)
            length = torch.where(squared > 0, eta * (gap + epsilon) / squared, 0.0)
            ahead = moved[active] - length.view(-1, *[1] * (moved.ndim - 1)) * slope
            moved[active] = ahead if bounds is None else ahead.clamp(*bounds)
    return moved, accepted


def _gap(
    name: str,
    teacher: Callable[[Tensor], Tensor],
    x: Tensor,  # (N, ...)
    base: Tensor,  # (N,)
    target: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:
    """L = f_base - f_target, its gradient in x, and the class of x."""
    with torch.enable_grad(), check.passes_gradient(name):
        x = x.detach().requires_grad_()
        logits = two_classes(teacher(x))
        gap = (logits.gather(1, base.unsqueeze(1)) - logits.gather(1, target.unsqueeze(1))).flatten()
        (slope,) = torch.autograd.grad(gap.sum(), x)
    return gap.detach(), slope, logits.detach().argmax(dim=1)


def _check(
    samples: Tensor,
    count: int,
    steps: int,
    eta: float,
    epsilon: float,
    bounds: tuple[float, float] | None = None,
) -> None:
    check.batches(2, 0, samples=samples)
    check.count("count", count, least=min(1, len(samples)))
    check.count("steps", steps)
    check.number("eta", eta, above=0)
    check.number("epsilon", epsilon, above=0)
    if bounds is not None:
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise ValueError(expected("bounds", "(lowest, highest)", bounds))
        check.number("bounds", bounds[1], above=check.number("bounds", bounds[0]))


def _vectors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    check.batches(2, 0, first=first, second=second)
    if first.shape != second.shape or first.ndim < 2 or len(first) == 0:
        what = f"vectors (N, ...), N > 0, of the other model's shape {tuple(first.shape)}"
        raise ValueError(expected("second", what, tuple(second.shape)))
    return first.flatten(1), second.flatten(1)
