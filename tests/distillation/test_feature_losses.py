"""Losses on feature maps against loops written from their formulas, in float64."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from kegfast.distillation.losses import (
    attention_map,
    attention_transfer,
    flow,
    fsp,
    hint,
    make_regressor,
)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_hint_is_its_formula():
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    squares = [
        (a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    ]
    assert hint(student, teacher).item() == pytest.approx(0.5 * np.mean(squares), rel=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer_is_its_formula(power):
    student, teacher = maps(2, 3, 4, 5), maps(2, 6, 4, 5, seed=1)

    def unit(features: np.ndarray) -> np.ndarray:  # (C, H, W)
        attention = np.zeros(features.shape[1:])
        for channel in features:
            attention += np.abs(channel) ** power
        return attention / math.sqrt((attention**2).sum())

    terms = [(unit(s) - unit(t)) ** 2 for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    assert attention_transfer(student, teacher, power=power).item() == pytest.approx(
        np.mean(terms), rel=1e-12
    )
    torch.testing.assert_close(attention_map(student).norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_attention_of_a_dead_layer_is_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(student, torch.randn(2, 3, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_flow_is_its_formula():
    first, second = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    expected = np.zeros((2, 3, 5))
    for b, i, j, y, x in product(range(2), range(3), range(5), range(4), range(4)):
        expected[b, i, j] += first[b, i, y, x] * second[b, j, y, x] / 16
    np.testing.assert_allclose(flow(first, second).numpy(), expected, rtol=1e-12)


def test_flow_pools_the_larger_map():
    first, second = maps(2, 3, 8, 8), maps(2, 5, 4, 4, seed=1)
    pooled = first.view(2, 3, 4, 2, 4, 2).amax(dim=(3, 5))
    torch.testing.assert_close(flow(first, second), flow(pooled, second))


def test_fsp_is_its_formula():
    student = maps(2, 3, 4, 4), maps(2, 5, 2, 2, seed=1)
    teacher = maps(2, 3, 6, 6, seed=2), maps(2, 5, 3, 3, seed=3)
    ours, theirs = flow(*student).numpy(), flow(*teacher).numpy()
    expected = sum(((a - b) ** 2).sum() for a, b in zip(ours, theirs, strict=True)) / 2
    assert fsp(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: hint(s, maps(2, 3, 4, 4, seed=1)),
        lambda s: attention_transfer(s, maps(2, 5, 4, 4, seed=1)),
        lambda s: fsp((s, s.square()), (maps(2, 3, 4, 4, seed=1), maps(2, 3, 4, 4, seed=2))),
    ],
)
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, (maps(2, 3, 4, 4).requires_grad_(),))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: hint(s, t),
        lambda s, t: attention_transfer(s, t),
        lambda s, t: fsp((s, s), (t, t)),
    ],
)
def test_the_teacher_gets_no_gradient_and_autocast_keeps_float32(loss):
    student, teacher = maps(2, 3, 4, 4).bfloat16(), maps(2, 3, 4, 4, seed=1).bfloat16()
    expected = loss(student.double(), teacher.double()).item()
    teacher.requires_grad_()
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [hint, attention_transfer])
def test_compiles_into_one_graph(loss):
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "kernel_size", "kernel"),
    [
        ((2, 3, 8, 8), (2, 6, 8, 8), None, (1, 1)),
        ((2, 3, 8, 8), (2, 6, 8, 8), 3, (3, 3)),
        ((2, 3, 8, 7), (2, 6, 5, 7), None, (4, 1)),
    ],
)
def test_a_regressor_fits_maps(student, teacher, kernel_size, kernel):
    regressor = make_regressor(torch.randn(student), torch.randn(teacher), kernel_size)
    assert regressor.kernel_size == kernel
    assert regressor(torch.randn(student)).shape == teacher


def test_a_regressor_fits_vectors():
    regressor = make_regressor(torch.randn(2, 3), torch.randn(2, 6))
    assert isinstance(regressor, nn.Linear)
    assert regressor(torch.randn(2, 3)).shape == (2, 6)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: hint(maps(2, 3), maps(2, 4)), "teacher"),
        (lambda: make_regressor(maps(2, 3, 4, 4), maps(2, 3)), "teacher"),
        (lambda: make_regressor(maps(2, 3, 4, 4), maps(2, 3, 8, 8)), "teacher"),
        (lambda: make_regressor(maps(2, 3, 4, 4), maps(2, 3, 4, 4), 5), "kernel_size"),
        (lambda: attention_transfer(maps(2, 3, 4, 4), maps(2, 3, 8, 8)), "teacher"),
        (lambda: attention_transfer(maps(2, 3), maps(2, 3)), "features"),
        (lambda: flow(maps(2, 3, 4, 4), maps(3, 3, 4, 4)), "second"),
        (lambda: flow(maps(2, 3), maps(2, 3)), "second"),
        (lambda: fsp((maps(2, 3, 4, 4),) * 2, (maps(2, 4, 4, 4),) * 2), "teacher"),
        (lambda: fsp((maps(2, 3, 4, 4),) * 2, maps(2, 4, 4, 4)[:1]), "teacher"),
        (lambda: hint(maps(0, 3), maps(0, 3)), "student"),
        (lambda: hint(maps(2, 3), None), "teacher"),
        (lambda: hint(maps(2, 3).long(), maps(2, 3)), "student"),
        (lambda: attention_transfer(maps(2, 3, 4, 4), maps(2, 3, 4, 4), power=0), "power"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        call()
