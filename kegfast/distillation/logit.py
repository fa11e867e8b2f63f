"""Losses on the outputs of the two models: what the student is told about the teacher's answer.

A lone logit speaks for class 1 against class 0: the losses take it with a logit of 0 before it, whose softmax
is its sigmoid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kegfast import functional
from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.logits import two_classes
from kegfast.distillation.precision import wide

UNLABELED = -100
"""The label of a sample without one: `torch.nn.functional.cross_entropy`'s `ignore_index`."""


def soft_target(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    labels: Tensor | None = None,  # (B,) int64
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
) -> Tensor:
    """Match the teacher's softened probabilities (Hinton, Vinyals and Dean 2015).

    `alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student, labels)`,
    both terms averaged over the batch. `T^2` keeps the gradient's size when the temperature changes
    (section 2 of the paper).

    Args:
        student: Logits, (B, C). They alone receive gradients.
        teacher: Logits, (B, C).
        labels: Classes, (B,) int64, needed when `alpha < 1`; samples labeled -100 have none and
            count in the first term only.
        temperature: `T > 0`. 4 suits about ten classes; the paper used 2.5 to 20.
        alpha: Weight of the soft term, in [0, 1]. The paper gives the hard term the "considerably
            lower" weight; 1, the default, needs no label.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        ValueError: Shapes differ, a number is out of its range, or labels are missing.
    """
    student, teacher = _logits(student, teacher)
    check.number("temperature", temperature, above=0)
    check.number("alpha", alpha, least=0, most=1)
    loss = student.new_zeros(())
    if alpha > 0:
        loss = alpha * functional.soft_target(student, teacher, temperature)
    if alpha < 1:
        loss = loss + (1 - alpha) * hard_label(student, teacher, labels)
    return loss


def hard_label(
    student: Tensor,  # (B, C) logits
    teacher: Tensor | None,  # unused
    labels: Tensor | None,  # (B,) int64
) -> Tensor:
    """Cross-entropy with the labels, averaged over the samples that have one (label not -100).

    Args:
        student: Logits, (B, C).
        teacher: Not looked at: all losses of an objective are called alike.
        labels: Classes, (B,) int64, -100 where a sample has none.

    Returns:
        A scalar, in float32 or wider; 0 where no sample has a label.

    Raises:
        TypeError, ValueError: Labels are missing, or no classes of these logits.
    """
    student, _ = _logits(student, student)
    if labels is None:
        raise ValueError(expected("labels", "the class of each sample", None))
    check_labels(labels, student)
    total = F.cross_entropy(student, labels, ignore_index=UNLABELED, reduction="sum")
    return total / (labels != UNLABELED).sum().clamp(min=1)


def logit_regression(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
) -> Tensor:
    """Regress the teacher's logits (Ba and Caruana 2014, equation 1).

    `1 / (2 B) * sum_i ||student_i - teacher_i||_2^2`, a scalar in float32 or wider.
    """
    student, teacher = _logits(student, teacher)
    return 0.5 * (student - teacher).square().sum(dim=1).mean()


def noisy_logits(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    *,
    share: float = 0.5,
    std: float = 0.5,
) -> Tensor:
    """Regress a teacher that is disturbed now and then (Sau and Balasubramanian 2016).

    A random `share` of the batch has its teacher's logits `z` replaced by `(1 + xi) * z`, where
    every entry of `xi` is drawn from N(0, std^2); `logit_regression` follows. The noise regularizes
    the student as several teachers would. It is drawn from torch's global generator.

    Args:
        student: Logits, (B, C).
        teacher: Logits, (B, C).
        share: Probability in [0, 1] that a sample is disturbed (the paper's alpha). The defaults of
            both are this library's choice.
        std: Standard deviation of the relative noise, at least 0 (the paper's sigma).

    Returns:
        A scalar, in float32 or wider.
    """
    student, teacher = _logits(student, teacher)
    check.number("share", share, least=0, most=1)
    check.number("std", std, least=0)
    disturbed = torch.rand_like(teacher[:, :1]) < share
    noise = torch.randn_like(teacher) * std
    return logit_regression(student, teacher * (1 + noise * disturbed))


def decoupled(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
    labels: Tensor | None = None,  # (B,) int64
    *,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, equation 7).

    `T^2 * (target_weight * TCKD + other_weight * NCKD)`, averaged over the batch. TCKD is the KL
    divergence between (p_target, 1 - p_target) of the two models, NCKD that between their softmax
    over the classes without the target. With two classes a single one is left over, NCKD is zero
    and passes no gradient.

    Args:
        student: Logits, (B, C).
        teacher: Logits, (B, C).
        labels: Target classes, (B,) int64; the teacher's own where missing or -100.
        temperature: `T > 0`.
        target_weight: The paper's alpha, 1.
        other_weight: The paper's beta, 8 on CIFAR-100 for most pairs.

    Returns:
        A scalar, in float32 or wider.
    """
    student, teacher = _logits(student, teacher)
    check.number("temperature", temperature, above=0)
    target = teacher.argmax(dim=1)
    if labels is not None:
        check_labels(labels, student)
        target = torch.where(labels == UNLABELED, target, labels)
    student_two, student_rest = _split(student / temperature, target)
    teacher_two, teacher_rest = _split(teacher / temperature, target)
    tckd = _divergence(student_two, teacher_two)
    nckd = _divergence(student_rest, teacher_rest)
    return temperature**2 * (target_weight * tckd + other_weight * nckd)


def _split(
    logits: Tensor,  # (B, C)
    target: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:  # (B, 2), (B, C - 1)
    """Logits of "the target or not" and of the classes that are not the target."""
    target = target.unsqueeze(1)
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    rest = logits.gather(1, others + (others >= target))
    two = torch.cat([logits.gather(1, target), rest.logsumexp(dim=1, keepdim=True)], dim=1)
    return two, rest


def _divergence(
    student: Tensor,  # (B, C) logits
    teacher: Tensor,  # (B, C) logits
) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), averaged over the batch."""
    return F.kl_div(
        student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="batchmean", log_target=True
    )


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, C), C of at least 2, in float32 or wider, the teacher cut off from the graph."""
    check.batches(student=student, teacher=teacher)
    if student.ndim != 2:
        raise ValueError(expected("student", "logits (B, C)", student))
    if teacher.shape != student.shape:
        raise ValueError(expected("teacher", f"logits of shape {tuple(student.shape)}", teacher))
    return two_classes(wide(student)), two_classes(wide(teacher.detach()))


def check_labels(labels: Tensor, student: Tensor, name: str = "labels") -> None:  # (B,), (B, C)
    """Raises for what are no classes; on a GPU their range is left to its own check, which need not wait."""
    batch, classes = student.shape
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        raise TypeError(expected(name, "classes, int64", labels))
    if labels.shape != (batch,):
        raise ValueError(expected(name, f"of shape ({batch},)", labels))
    if labels.is_cpu and not torch.compiler.is_compiling():
        wrong = labels[((labels < 0) & (labels != UNLABELED)) | (labels >= classes)]
        if len(wrong):
            raise ValueError(expected(name, f"0 to {classes - 1}, as the logits", int(wrong[0])))
