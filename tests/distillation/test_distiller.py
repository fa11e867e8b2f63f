"""The loop: what it learns, from what."""

import copy

import pytest
import torch
import torch.multiprocessing
from small_models import agreement, perceptron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kegfast
from kegfast.distillation import GaussianNoise, InMemory, Mixture, Pool, losses


@pytest.mark.parametrize(
    "loss", ["soft_target", "logit_regression", "noisy_logits", "decoupled", "soft_target+boundary"]
)
@pytest.mark.parametrize("kept", [False, True])
def test_the_student_learns_the_teachers_classes(student, teacher, noise, loss, kept):
    torch.manual_seed(0)
    source = Pool(noise, 2000) if kept else noise
    before = agreement(student, teacher)
    history = kegfast.distill(student, teacher, source, loss=loss, steps=300, lr=1e-2)
    assert before < 0.5
    assert agreement(student, teacher) > 0.85
    assert history[-1]["step"] == 300
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    "source",
    [
        torch.randn(64, 8),
        TensorDataset(torch.randn(64, 8), torch.randint(4, (64,))),
        DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=10),
        Mixture([torch.randn(64, 8), GaussianNoise((8,))]),
    ],
    ids=["tensor", "dataset", "loader", "mixture"],
)
def test_any_source_will_do(student, teacher, source):
    start = copy.deepcopy(student.state_dict())
    kegfast.distill(student, teacher, source, steps=3, batch_size=16)
    assert not torch.equal(start["0.weight"], student.state_dict()["0.weight"])


def test_a_network_that_makes_samples_is_not_trained(student, teacher):
    class Network(nn.Linear):
        def sample(self, n):
            return self(torch.randn(n, 3)), None

    source = Network(3, 8)
    kegfast.distill(student, teacher, source, steps=2)
    assert source.weight.grad is None


def test_labels_are_used_below_alpha_one(teacher):
    torch.manual_seed(0)
    samples = torch.randn(256, 8)
    labels = (teacher(samples).argmax(dim=1) + 1) % 4  # contradict the teacher
    student = perceptron(8, 32, 4)
    kegfast.distill(student, teacher, InMemory(samples, labels), alpha=0.0, steps=200, lr=1e-2)
    assert (student(samples).argmax(dim=1) == labels).float().mean() > 0.8


class AskEachTime:
    """The same draws from an object that keeps no answers."""

    def __init__(self, source):
        self.sample = source.sample


def test_a_pool_gives_the_run_that_asking_each_time_gives(student, teacher, noise):
    torch.manual_seed(0)
    pool = Pool(noise, 100)
    other = copy.deepcopy(student)
    first = kegfast.distill(student, teacher, pool, steps=20)
    second = kegfast.distill(other, teacher, AskEachTime(pool), steps=20)
    assert [entry["loss"] for entry in first] == pytest.approx([entry["loss"] for entry in second], rel=1e-4)


def test_the_seed_repeats_a_run_and_the_callers_draws_go_on(student, teacher, noise):
    other, third = copy.deepcopy(student), copy.deepcopy(student)
    torch.manual_seed(5)
    kegfast.distill(student, teacher, noise, steps=5)
    after = torch.rand(1)
    kegfast.distill(other, teacher, noise, steps=5)
    kegfast.distill(third, teacher, noise, steps=5, seed=1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(student[0].weight, other[0].weight)
    assert not torch.equal(student[0].weight, third[0].weight)


def test_several_teachers_are_averaged(student, noise):
    teachers = [perceptron(8, 32, 4, seed=s) for s in (1, 2, 3)]
    seen = []

    def loss(ours, theirs, labels):
        seen.append(theirs)
        return losses.soft_target(ours, theirs)

    samples = torch.randn(1, 8)
    kegfast.distill(student, teachers, InMemory(samples), loss=loss, steps=1, temperature=2.0)
    expected = sum((t(samples) / 2).softmax(dim=1) for t in teachers) / 3
    torch.testing.assert_close((seen[0][:1] / 2).softmax(dim=1), expected)


def test_schedules_scale_the_rate(student, teacher, noise):
    def rates(schedule):
        seen = []

        def make(parameters):
            optimizer = torch.optim.SGD(parameters, lr=0.5)
            optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
            return optimizer

        kegfast.distill(student, teacher, noise, steps=4, optimizer=make, schedule=schedule)
        return seen

    assert rates("constant") == [0.5] * 4
    assert rates("cosine") == pytest.approx([0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)])
    assert rates(lambda done: 1 - done) == pytest.approx([0.5, 0.375, 0.25, 0.125])
