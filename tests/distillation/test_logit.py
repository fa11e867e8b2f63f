"""Losses on logits against loops written from their formulas, in float64."""

import math

import numpy as np
import pytest
import torch

from kegfast.distillation.losses import (
    decoupled,
    hard_label,
    logit_regression,
    noisy_logits,
    soft_target,
)

BATCH, CLASSES = 5, 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student = 3 * torch.randn(BATCH, CLASSES, dtype=torch.float64)
    teacher = 3 * torch.randn(BATCH, CLASSES, dtype=torch.float64)
    return student, teacher, torch.tensor([0, 6, 3, 3, 1])


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def divide(row: torch.Tensor, temperature: float) -> list[float]:
    return [x / temperature for x in row.tolist()]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_soft_target_is_its_formula(logits, temperature, alpha):
    student, teacher, labels = logits
    soft = hard = 0.0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        soft += kl(softmax(divide(t, temperature)), softmax(divide(s, temperature))) / BATCH
        hard -= math.log(softmax(s.tolist())[label]) / BATCH
    expected = alpha * temperature**2 * soft + (1 - alpha) * hard
    loss = soft_target(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_soft_target_gradient_keeps_its_size_when_the_temperature_grows(logits):
    # Hinton et al., section 2.1: for a large T and zero-mean logits the gradient of T^2 KL tends
    # to (student - teacher) / C, and does not vanish with 1 / T^2.
    student, teacher, _ = (x - x.mean(dim=-1, keepdim=True) if x.is_floating_point() else x for x in logits)
    student.requires_grad_()
    soft_target(student, teacher, temperature=1e4).backward()
    expected = (student.detach() - teacher) / CLASSES / BATCH
    torch.testing.assert_close(student.grad, expected, rtol=1e-2, atol=1e-4)


def test_samples_without_a_label_count_in_the_soft_term_only(logits):
    student, teacher, labels = logits
    some = labels.clone()
    some[1:3] = -100
    known = [0, 3, 4]
    hard = -np.mean([math.log(softmax(student[i].tolist())[labels[i]]) for i in known])
    assert hard_label(student, None, some).item() == pytest.approx(hard, rel=1e-12)
    none = torch.full_like(labels, -100)
    assert hard_label(student, None, none).item() == 0.0
    assert torch.equal(soft_target(student, teacher, none), soft_target(student, teacher))


def test_logit_regression_is_its_formula(logits):
    student, teacher, _ = logits
    expected = sum((a - b) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)) / (
        2 * BATCH
    )
    assert logit_regression(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


def test_noisy_logits_without_noise_is_logit_regression(logits):
    student, teacher, _ = logits
    clean = logit_regression(student, teacher)
    assert torch.equal(noisy_logits(student, teacher, share=0.0), clean)
    assert torch.equal(noisy_logits(student, teacher, std=0.0), clean)


def test_noisy_logits_disturbs_its_share_of_samples_by_its_relative_noise():
    # At student = teacher = 1 the loss of a sample is sum(xi^2) / 2, and zero where it is not disturbed.
    torch.manual_seed(0)
    ones = torch.ones(1, 400, dtype=torch.float64)
    losses = torch.stack([noisy_logits(ones, ones, share=0.25, std=0.3) for _ in range(2000)])
    assert (losses > 0).double().mean().item() == pytest.approx(0.25, abs=0.04)
    assert losses[losses > 0].mean().item() == pytest.approx(400 * 0.3**2 / 2, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_is_its_formula(logits, temperature):
    student, teacher, labels = logits
    tckd = nckd = 0.0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        p, q = softmax(divide(t, temperature)), softmax(divide(s, temperature))
        tckd += kl([p[label], 1 - p[label]], [q[label], 1 - q[label]]) / BATCH
        rest = [k for k in range(CLASSES) if k != label]
        nckd += kl([p[k] / (1 - p[label]) for k in rest], [q[k] / (1 - q[label]) for k in rest]) / BATCH
    expected = temperature**2 * (1.5 * tckd + 6.0 * nckd)
    loss = decoupled(student, teacher, labels, temperature=temperature, target_weight=1.5, other_weight=6.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_decoupled_splits_soft_target(logits):
    # Zhao et al., equation 6: KD = TCKD + (1 - p_target) NCKD; with one sample the weights can be set.
    student, teacher, labels = (x[:1] for x in logits)
    rest = 1 - softmax(divide(teacher[0], 4.0))[labels.item()]
    assert decoupled(student, teacher, labels, other_weight=rest).item() == pytest.approx(
        soft_target(student, teacher).item(), rel=1e-12
    )


def test_decoupled_with_two_classes_has_no_other_class_to_learn():
    torch.manual_seed(0)
    student = torch.randn(4, 2, requires_grad=True)
    teacher, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    loss = decoupled(student, teacher, labels, other_weight=1e6)
    torch.testing.assert_close(loss, soft_target(student, teacher))
    loss.backward()
    assert student.grad.isfinite().all()


def test_decoupled_takes_the_teachers_class_where_there_is_no_label(logits):
    student, teacher, labels = logits
    own = teacher.argmax(dim=1)
    assert torch.equal(decoupled(student, teacher), decoupled(student, teacher, own))
    half = torch.where(torch.arange(BATCH) < 2, labels, -100)
    mixed = torch.where(torch.arange(BATCH) < 2, labels, own)
    assert torch.equal(decoupled(student, teacher, half), decoupled(student, teacher, mixed))


LOSSES = {
    "soft_target": lambda s, t, y: soft_target(s, t, y, alpha=0.7),
    "logit_regression": lambda s, t, y: logit_regression(s, t),
    "noisy_logits": lambda s, t, y: (torch.manual_seed(0), noisy_logits(s, t))[1],
    "decoupled": decoupled,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(logits, name):
    student, teacher, labels = logits
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, labels), (student,))
    LOSSES[name](student, teacher, labels).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(logits, name):
    student, teacher, labels = logits
    student, teacher = student.bfloat16(), teacher.bfloat16()
    loss = LOSSES[name](student, teacher, labels)
    assert loss.dtype == torch.float32
    if name != "noisy_logits":  # its noise differs with the dtype
        expected = LOSSES[name](student.double(), teacher.double(), labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["soft_target", "logit_regression", "decoupled"])
def test_compiles_into_one_graph(logits, name):
    student, teacher, labels = logits
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, labels), LOSSES[name](student, teacher, labels))


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("name", ["soft_target", "decoupled"])
def test_enormous_logits_stay_finite(name, scale):
    torch.manual_seed(0)
    student = (scale * torch.randn(4, 10)).requires_grad_()
    teacher, labels = scale * torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    loss = LOSSES[name](student, teacher, labels)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda s, t, y: soft_target(s, t[:, 1:]), "teacher"),
        (lambda s, t, y: soft_target(s[0], t[0]), "student"),
        (lambda s, t, y: soft_target(s[:0], t[:0]), "student"),
        (lambda s, t, y: hard_label(s.unsqueeze(2), None, y), "student"),
        (lambda s, t, y: hard_label(s, None, y.tolist()), "labels"),
        (lambda s, t, y: logit_regression(s.unsqueeze(2), t.unsqueeze(2)), "student"),
        (lambda s, t, y: soft_target(s, t, temperature=0), "temperature"),
        (lambda s, t, y: soft_target(s, t, temperature=math.nan), "temperature"),
        (lambda s, t, y: soft_target(s, t, alpha=1.5), "alpha"),
        (lambda s, t, y: soft_target(s, t, alpha=0.5), "labels"),
        (lambda s, t, y: soft_target(s, t, y[1:], alpha=0.5), "labels"),
        (lambda s, t, y: soft_target(s, t, y + s.shape[1], alpha=0.5), "labels"),
        (lambda s, t, y: soft_target(s, t, y.double(), alpha=0.5), "labels"),
        (lambda s, t, y: soft_target(s, t, temperature="4"), "temperature"),
        (lambda s, t, y: soft_target(s, t.to("meta")), "teacher"),
        (lambda s, t, y: noisy_logits(s, t, share=2), "share"),
        (lambda s, t, y: noisy_logits(s, t, std=-1), "std"),
        (lambda s, t, y: decoupled(s, t, y - 2 * s.shape[1]), "labels"),
    ],
)
def test_bad_arguments_are_named(logits, call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        call(*logits)
