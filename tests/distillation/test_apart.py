"""A student that has tensors in common with its teacher."""

import copy

import pytest
import torch
from small_models import convolutional
from torch import nn

import kegfast
from kegfast.distillation import GaussianNoise

NOISE = GaussianNoise((1, 9, 9))


def tie_module(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[6] = teacher[6]


def tie_parameter(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[3].weight = teacher[3].weight


def tie_memory(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[6].weight = nn.Parameter(teacher[6].weight.detach())


def tie_part(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[3].bias = nn.Parameter(teacher[3].weight.detach().view(-1)[8:12])


def tie_statistics(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[1].running_mean = teacher[1].running_mean


TIES = [tie_module, tie_parameter, tie_memory, tie_part, tie_statistics]


@pytest.mark.parametrize("tie", TIES)
def test_tensors_that_a_step_would_change_are_refused(tie):
    student, teacher = convolutional(4, seed=1), convolutional(4, seed=2)
    tie(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"^student must be a model that shares nothing with the teacher"):
        kegfast.distill(student, teacher, NOISE, steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("tie", TIES[:3])
def test_frozen_ones_are_shared_and_stay_as_they_are(tie):
    student, teacher = convolutional(4, seed=1), convolutional(4, seed=2)
    tie(student, teacher)
    student[6].requires_grad_(False)
    student[3].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    kegfast.distill(student, teacher, NOISE, steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_frozen_module_of_both_answers_alike_for_both():
    """In the student's train mode it would move its statistics and drop values for the teacher too."""
    teacher = nn.Sequential(*convolutional(4, seed=2)[:3], nn.Dropout(0.5), *convolutional(4, seed=2)[3:])
    teacher[:4].requires_grad_(False)
    student = nn.Sequential(teacher[:4], *convolutional(4, seed=1)[3:])
    x = torch.randn(5, 1, 9, 9)
    before = teacher.eval()(x)
    seen = []

    def loss(ours, theirs, labels):
        seen.append(teacher[3].training)
        return (ours - theirs).square().mean()

    kegfast.distill(student, teacher, NOISE, loss=loss, steps=3)
    assert seen == [False] * 3
    assert torch.equal(teacher.eval()(x), before)
