"""Distillation in several runs."""

import copy

import pytest
import torch
from torch import nn

from kegfast.distillation import GaussianNoise, born_again, distill, fitnets


def perceptron(width: int, depth: int = 2) -> nn.Sequential:
    layers = [nn.Linear(8, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


@pytest.fixture
def teacher() -> nn.Sequential:
    torch.manual_seed(0)
    return perceptron(32, depth=3)


def test_fitnets_is_a_hint_and_then_a_distillation(teacher, tmp_path):
    torch.manual_seed(1)
    student, noise = perceptron(16, depth=4), GaussianNoise((8,))
    other = copy.deepcopy(student)
    options = {"steps": 5, "lr": 1e-2}
    fitnets(student, teacher, noise, layers="3=1", hint_steps=7, checkpoint=tmp_path / "run.pt", **options)
    start = copy.deepcopy(other.state_dict())
    distill(other, teacher, noise, loss="hint@3=1", steps=7, lr=1e-2)
    assert torch.equal(start["6.weight"], other[6].weight)  # above the hint nothing moves
    assert not torch.equal(start["2.weight"], other[2].weight)
    distill(other, teacher, noise, **options)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.hint.pt", "run.pt"]


def test_generations_teach_one_another(teacher):
    noise = GaussianNoise((8,))
    students = born_again(lambda: perceptron(32), teacher, noise, generations=2, steps=4)
    torch.manual_seed(1)
    second = perceptron(32)
    distill(second, students[0], noise, steps=4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), students[1].parameters(), strict=True))
    with pytest.raises(ValueError, match=r"^generations must be"):
        born_again(lambda: perceptron(4), teacher, noise, generations=0)


def test_bad_arguments_are_named(teacher):
    noise, student = GaussianNoise((8,)), perceptron(16)
    with pytest.raises(ValueError, match=r"^hint_steps must be"):
        fitnets(student, teacher, noise, layers="1=1", hint_steps=0)
    with pytest.raises(ValueError, match=r"^loss must be 'hint@layer'"):
        fitnets(student, teacher, noise, layers="")
    with pytest.raises(TypeError, match=r"^make_student must be"):
        born_again(student.state_dict(), teacher, noise)
    with pytest.raises(TypeError, match=r"^seed must be"):
        born_again(lambda: perceptron(4), teacher, noise, seed="0")
