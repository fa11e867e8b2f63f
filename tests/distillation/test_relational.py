"""Relational losses against loops over pairs and triples, in float64."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kegfast.distillation import relational
from kegfast.distillation.losses import rkd_angle, rkd_distance

BATCH = 6


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Spread so far that some differences lie in Huber's linear part."""
    torch.manual_seed(0)
    student = torch.randn(BATCH, 3, 2, dtype=torch.float64)
    teacher = torch.randn(BATCH, 5, dtype=torch.float64)
    student[0] *= 20
    return student, teacher


def rows(x: torch.Tensor) -> list[np.ndarray]:
    return list(x.flatten(1).numpy())


def huber(d: float) -> float:
    return d * d / 2 if abs(d) <= 1 else abs(d) - 0.5


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cosine(a: np.ndarray, corner: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a - corner, b - corner)) / distance(a, corner) / distance(b, corner)


def test_distance_is_its_formula(features):
    s, t = map(rows, features)
    pairs = list(permutations(range(BATCH), 2))
    ours = [distance(s[i], s[j]) for i, j in pairs]
    theirs = [distance(t[i], t[j]) for i, j in pairs]
    differences = [a / np.mean(ours) - b / np.mean(theirs) for a, b in zip(ours, theirs, strict=True)]
    assert max(map(abs, differences)) > 1
    assert rkd_distance(*features).item() == pytest.approx(
        np.mean([huber(d) for d in differences]), rel=1e-12
    )


@pytest.mark.parametrize("elements", [1, 2 * BATCH**2, 1 << 20])
def test_angle_is_its_formula(features, elements, monkeypatch):
    monkeypatch.setattr(relational, "_CHUNK_ELEMENTS", elements)
    s, t = map(rows, features)
    terms = [
        huber(cosine(s[i], s[j], s[k]) - cosine(t[i], t[j], t[k]))
        for i, j, k in permutations(range(BATCH), 3)
    ]
    assert rkd_angle(*features).item() == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("elements", [1, 2 * BATCH**2, 1 << 20])
@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_gradients(features, loss, elements, monkeypatch):
    monkeypatch.setattr(relational, "_CHUNK_ELEMENTS", elements)
    student, teacher = (x.requires_grad_() for x in features)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))
    (3 * loss(student, teacher)).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_moving_turning_and_scaling_a_batch_changes_nothing(features, loss):
    teacher = features[1]
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert loss(3 * teacher @ rotation + 7, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_coinciding_points_give_finite_gradients(loss):
    student = torch.ones(4, 3)
    student[3] = 2
    student.requires_grad_()
    value = loss(student, torch.randn(4, 8))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    same = torch.ones(4, 3, requires_grad=True)
    loss(same, torch.ones(4, 8)).backward()
    assert same.grad.isfinite().all()


def test_small_triangles_far_from_the_center_keep_their_angles():
    torch.manual_seed(0)
    student = torch.cat([1e-3 * torch.randn(6, 4), 10 + torch.randn(6, 4)]).requires_grad_()
    teacher = torch.randn(12, 4)
    loss = rkd_angle(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    wide = student.detach().double().requires_grad_()
    exact = rkd_angle(wide, teacher.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    (exact_gradient,) = torch.autograd.grad(exact, wide)
    # The center, 5, is taken off in float32: positions within the triangles lose 3e-7 of 1e-3.
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=5e-3, atol=1e-3 * exact_gradient.abs().max().item()
    )


def test_coinciding_points_have_no_distance():
    points = torch.randn(40, 300).repeat_interleave(2, dim=0) + 5  # rounding differs within the product
    distances = relational._distances(relational._gram(points))
    pairs = torch.arange(0, 80, 2)
    assert not distances[pairs, pairs + 1].any()
    torch.testing.assert_close(distances, torch.cdist(points.double(), points.double()), rtol=1e-9, atol=1e-4)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_autocast_and_half_precision_keep_float32(features, loss):
    student, teacher = (x.bfloat16() for x in features)
    expected = loss(student.double(), teacher.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
        assert loss(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that any operator puts out."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_there_is_no_buffer_of_batch_squared_times_features(loss):
    size, width = 96, 2048  # such a buffer would hold 19 million entries
    student, teacher = torch.randn(size, width, requires_grad=True), torch.randn(size, width)
    with Largest() as largest:
        loss(student, teacher).backward()
    assert largest.entries == size * width  # the features themselves


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_compiles_into_one_graph(features, loss):
    student, teacher = features
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student.requires_grad_()
    value = compiled(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    expected = loss(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "argument"),
    [
        (rkd_distance, (1, 3), (1, 3), "student"),
        (rkd_angle, (2, 3), (2, 3), "student"),
        (rkd_angle, (4, 3), (5, 3), "teacher"),
        (rkd_distance, (4,), (4, 3), "student"),
    ],
)
def test_bad_arguments_are_named(loss, student, teacher, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        loss(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
@pytest.mark.parametrize(
    "teacher", [None, "maps", torch.ones(4, 3, dtype=int), torch.ones(4, 3, device="meta")]
)
def test_what_is_no_batch_of_numbers_is_refused(loss, teacher):
    with pytest.raises((TypeError, ValueError), match=r"^teacher must be"):
        loss(torch.randn(4, 3), teacher)
