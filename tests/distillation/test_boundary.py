"""Boundary samples: the scheme on teachers whose boundary is known, and the two similarities."""

import math

import pytest
import torch
from torch import nn

from kegfast.distillation.boundary import (
    angle_similarity,
    boundary_loss,
    boundary_samples,
    boundary_weight,
    magnitude_similarity,
    perturbations,
    soft_weight,
)
from kegfast.distillation.objective import Batch


class Linear(nn.Module):
    """A teacher of three classes, linear in (B, 2, 1) samples."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def teacher() -> Linear:
    return Linear([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]])


@pytest.fixture
def samples() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(60, 2, 1, dtype=torch.float64)


def by_hand(weight, x, base, target, steps, eta, epsilon):
    """The paper's scheme for one sample of a linear teacher, in plain numbers."""
    difference = [weight[base][d] - weight[target][d] for d in range(2)]
    squared = sum(d * d for d in difference)
    for _ in range(steps):
        logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
        if max(range(3), key=logits.__getitem__) != base:
            break
        gap = logits[base] - logits[target]
        x = [v - eta * (gap + epsilon) / squared * d for v, d in zip(x, difference, strict=True)]
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
    return x, max(range(3), key=logits.__getitem__) == target


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_each_sample_follows_the_papers_scheme(teacher, samples, eta, steps):
    found = boundary_samples(teacher, samples, eta=eta, steps=steps, epsilon=0.1)
    assert len(found.index) == len(samples)
    assert not torch.equal(found.base, found.target)
    weight = teacher.weight.tolist()
    for row, index in enumerate(found.index.tolist()):
        base, target = found.base[row].item(), found.target[row].item()
        assert base != target
        expected, reached = by_hand(weight, samples[index].flatten().tolist(), base, target, steps, eta, 0.1)
        assert found.samples[row].flatten().tolist() == pytest.approx(expected, rel=1e-9)
        assert found.accepted[row].item() == reached
    if eta == 1.0:
        assert found.accepted.any()
        assert not found.accepted.all()  # some reach a third class first


def test_accepted_samples_lie_just_across_the_boundary(teacher, samples):
    found = boundary_samples(teacher, samples, epsilon=1e-6)
    logits = teacher(found.samples[found.accepted]).detach()
    base = logits.gather(1, found.base[found.accepted, None])
    target = logits.gather(1, found.target[found.accepted, None])
    assert (target > base).all()
    torch.testing.assert_close(target - base, torch.full_like(base, 1e-6), rtol=1e-3, atol=0)


def test_base_samples_are_right_in_both_and_differ_most(teacher, samples):
    torch.manual_seed(1)
    teacher_logits = teacher(samples).detach()
    student_logits = teacher_logits + torch.randn_like(teacher_logits)
    labels = teacher_logits.argmax(dim=1)
    labels[::3] = 0
    scores = []
    p, q = teacher_logits.softmax(dim=1), student_logits.softmax(dim=1)
    for i, label in enumerate(labels.tolist()):
        right = teacher_logits[i].argmax() == label and student_logits[i].argmax() == label
        score = sum((p[i, k] - q[i, k]).item() ** 2 for k in range(3) if k != label)
        scores.append((score, i) if right else (-1.0, i))
    expected = [i for score, i in sorted(scores, reverse=True)[:10] if score >= 0]
    found = boundary_samples(teacher, samples, labels, student_logits=student_logits, count=10)
    assert found.index.tolist() == expected
    every = boundary_samples(teacher, samples, labels, student_logits=student_logits, count=1000)
    assert len(every.index) == sum(score >= 0 for score, _ in scores)


def test_targets_are_drawn_by_the_teachers_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([[4.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    found = boundary_samples(
        nn.Identity(), torch.zeros(20000, 4), teacher_logits=logits, count=20000, steps=1
    )
    share = torch.bincount(found.target, minlength=4) / 20000
    weights = [0.0, math.e, math.e**2, 1 / math.e]
    expected = torch.tensor([w / sum(weights) for w in weights])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


def test_no_base_sample_gives_empty_rows(teacher, samples):
    wrong = (teacher(samples).argmax(dim=1) + 1) % 3
    found = boundary_samples(teacher, samples, wrong)
    assert found.samples.shape == (0, 2, 1)
    assert found.accepted.shape == (0,)


def test_a_flat_teacher_is_left_where_it_was_and_rejected():
    flat = Linear([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    samples = torch.ones(4, 2, 1, dtype=torch.float64)
    found = boundary_samples(flat, samples)
    assert torch.equal(found.samples, samples)
    assert not found.accepted.any()


def test_bounds_hold(teacher, samples):
    found = boundary_samples(teacher, samples.clamp(-0.5, 0.5), bounds=(-0.5, 0.5))
    assert found.samples.abs().max() <= 0.5


def test_the_search_leaves_no_trace_in_the_teacher(teacher, samples):
    found = boundary_samples(teacher, samples)
    assert teacher.weight.grad is None
    assert not found.samples.requires_grad


def test_the_loss_is_kl_on_accepted_samples(teacher, samples):
    student = Linear([[0.5, 0.2], [-1.0, 0.1], [0.1, -1.0]])
    logits = student(samples)
    batch = Batch(samples, None, logits, teacher(samples).detach(), ask_student=student, ask_teacher=teacher)
    torch.manual_seed(0)
    loss = boundary_loss(batch)
    torch.manual_seed(0)
    found = boundary_samples(teacher, samples, student_logits=logits)
    moved = found.samples[found.accepted]
    assert 0 < len(moved) <= 64
    expected = 0.0
    for t, s in zip(teacher(moved).tolist(), student(moved).tolist(), strict=True):
        p, q = ([math.exp(v / 3) for v in row] for row in (t, s))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(moved)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert student.weight.grad.abs().sum() > 0
    assert teacher.weight.grad is None


def test_the_loss_without_base_samples_is_zero(teacher, samples):
    student = Linear([[0.5, 0.2], [-1.0, 0.1], [0.1, -1.0]])
    wrong = (teacher(samples).argmax(dim=1) + 1) % 3
    batch = Batch(samples, wrong, student(samples), teacher(samples).detach(), {}, {}, student, teacher)
    loss = boundary_loss(batch)
    loss.backward()
    assert loss.item() == 0.0


def test_schedules_are_the_papers():
    assert [boundary_weight(x) for x in (0.0, 0.375, 0.75, 0.9)] == pytest.approx([2, 1, 0, 0])
    assert [soft_weight(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([4, 2.5, 1])


def test_similarities_are_their_formulas():
    torch.manual_seed(0)
    first, second = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    magnitude = angle = 0.0
    for a, b in zip(first.flatten(1).tolist(), second.flatten(1).tolist(), strict=True):
        na, nb = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        magnitude += min(na, nb) / max(na, nb) / 5
        angle += (sum(x * y for x, y in zip(a, b, strict=True)) / na / nb + 1) / 2 / 5
    assert magnitude_similarity(first, second).item() == pytest.approx(magnitude, rel=1e-12)
    assert angle_similarity(first, second).item() == pytest.approx(angle, rel=1e-12)


def test_similarities_at_their_ends():
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert magnitude_similarity(vectors, -vectors).item() == pytest.approx(1)
    assert angle_similarity(vectors, 3 * vectors).item() == pytest.approx(1)
    assert angle_similarity(vectors, -vectors).item() == pytest.approx(0, abs=1e-6)
    assert magnitude_similarity(vectors, 0 * vectors).item() == 0
    assert magnitude_similarity(0 * vectors, 0 * vectors).item() == 1


def test_perturbations_of_alike_and_of_turned_models(teacher, samples):
    labels = teacher(samples).argmax(dim=1)
    targets = (labels + 1) % 3
    ours, reached = perturbations(teacher, samples, labels, targets)
    assert ours.shape == samples.shape
    assert reached.any()
    again, _ = perturbations(teacher, samples, labels, targets)
    assert magnitude_similarity(ours, again).item() == pytest.approx(1)
    assert angle_similarity(ours, again).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"count": 0}, "count"),
        ({"steps": 0}, "steps"),
        ({"eta": 0}, "eta"),
        ({"epsilon": -1}, "epsilon"),
        ({"steps": 1.5}, "steps"),
        ({"labels": torch.zeros(2, dtype=int)}, "labels"),
        ({"labels": torch.tensor(0.0)}, "labels"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"bounds": (0.0, 1.0, 2.0)}, "bounds"),
        ({"bounds": (None, 1.0)}, "bounds"),
        ({"samples": torch.zeros(3, 5)}, "samples"),
        ({"student_logits": torch.zeros(1, 1)}, "student_logits"),
    ],
)
def test_bad_arguments_are_named(teacher, samples, options, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        boundary_samples(**({"teacher": teacher, "samples": samples} | options))
    with pytest.raises(ValueError, match=r"^second must be"):
        magnitude_similarity(samples, samples[1:])


@pytest.mark.parametrize("name", ["labels", "targets"])
@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.int64), torch.zeros(60), 3, -100])
def test_perturbations_refuse_what_are_no_classes(teacher, samples, name, wrong):
    wrong = torch.full((60,), wrong) if isinstance(wrong, int) else wrong
    classes = {"labels": torch.zeros(60, dtype=torch.int64), "targets": torch.ones(60, dtype=torch.int64)}
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
        perturbations(teacher, samples, **(classes | {name: wrong}))
