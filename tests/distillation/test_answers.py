"""Teachers and students that answer with one logit, with probabilities, or with what is no table at all."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from small_models import agreement, perceptron
from torch import nn

import kegfast
from kegfast.distillation import Ensemble, GaussianNoise, boundary, losses

X = torch.randn(2000, 8, generator=torch.Generator().manual_seed(4))


def sign_agreement(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return ((student(X) > 0) == (teacher(X) > 0)).float().mean().item()


@pytest.mark.parametrize("loss", ["soft_target", "decoupled", "logit_regression", "soft_target+boundary"])
def test_a_student_of_one_logit_learns_it(loss):
    teacher, student = perceptron(8, 16, 1, seed=1), perceptron(8, 16, 1, seed=2)
    kegfast.distill(student, teacher, GaussianNoise((8,)), loss=loss, steps=150, lr=1e-2)
    assert sign_agreement(student, teacher) > 0.85


def test_one_logit_is_taken_by_its_sigmoid():
    student, teacher = torch.randn(2, 7, 1, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, -100, 0, 1, 0])
    p, q = torch.sigmoid(teacher / 3).flatten(), torch.sigmoid(student / 3).flatten()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = losses.soft_target(student, teacher, temperature=3.0)
    torch.testing.assert_close(found, 9 * divergence.mean())
    known = labels >= 0
    hard = F.binary_cross_entropy_with_logits(student.flatten()[known], labels[known].double())
    torch.testing.assert_close(losses.hard_label(student, None, labels), hard)
    torch.testing.assert_close(losses.decoupled(student, teacher, labels, temperature=3.0), found)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_an_ensemble_of_one_logit_averages_it(average):
    models = [perceptron(8, 1, seed=seed) for seed in range(2)]
    answer = Ensemble(models, average=average)(X[:5])
    assert answer.shape == (5, 1)
    logits = [model(X[:5]) for model in models]
    mean = torch.stack([z.sigmoid() for z in logits]).mean(0).logit()
    torch.testing.assert_close(answer, mean if average == "probabilities" else sum(logits) / 2)


def test_training_and_accuracy_of_one_logit():
    teacher, model = perceptron(8, 16, 1, seed=1), perceptron(8, 16, 1, seed=2)
    data = torch.utils.data.TensorDataset(X, (teacher(X).flatten() > 0).long())
    kegfast.train(model, data, steps=100, lr=1e-2)
    assert kegfast.evaluate(model, data) > 85
    assert kegfast.evaluate(model, data) == pytest.approx(100 * sign_agreement(model, teacher))


class Softmax(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).softmax(1)


@pytest.mark.parametrize("source", [GaussianNoise((8,)), X], ids=["drawn", "in memory"])
@pytest.mark.parametrize("loss", ["soft_target", "soft_target+boundary"])
def test_a_teacher_that_ends_in_softmax_teaches_as_its_logits_do(source, loss, teacher, student, caplog):
    other = copy.deepcopy(student)
    options = {"loss": loss, "steps": 20, "batch_size": 64}
    kegfast.distill(student, teacher, source, **options)
    with caplog.at_level(logging.WARNING):
        kegfast.distill(other, Softmax(teacher), source, **options)
    assert "teacher answers with probabilities" in caplog.text
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_student_that_ends_in_softmax_learns_by_its_logarithm(student, teacher, noise):
    other = copy.deepcopy(student)
    kegfast.distill(student, teacher, noise, steps=20)
    kegfast.distill(Softmax(other), teacher, noise, steps=20)
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_ensemble_takes_the_logarithm_of_probabilities():
    models = [perceptron(8, 3, seed=seed) for seed in range(2)]
    mixed = Ensemble([models[0], Softmax(models[1])])(X)
    torch.testing.assert_close(mixed.softmax(1), Ensemble(models)(X).softmax(1))


def test_training_of_a_network_that_ends_in_softmax():
    model, other = perceptron(8, 16, 3, seed=1), perceptron(8, 16, 3, seed=1)
    data = torch.utils.data.TensorDataset(X, X[:, :3].argmax(1))
    kegfast.train(model, data, steps=20)
    kegfast.train(Softmax(other), data, steps=20)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


class Named(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize("source", [GaussianNoise((8,)), X], ids=["drawn", "in memory"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_dicts_are_refused_by_the_name_of_the_model(source, role, student, teacher):
    models = {"student": student, "teacher": teacher, role: Named(8, 4)}
    match = f"^{role} must be a model that gives logits, one tensor, got a dict of 'logits': a float32 tensor"
    with pytest.raises(TypeError, match=match):
        kegfast.distill(**models, source=source, steps=30, batch_size=128)


WAYS = {
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "detach": lambda model, x: model(x).detach(),
    "numpy": lambda model, x: torch.from_numpy(model(x.detach()).detach().numpy()),
    "bare numpy": lambda model, x: model(torch.from_numpy(x.numpy())),
}


class Cut(nn.Module):
    """The answers of a model, without gradients, in one of the ways that users write."""

    def __init__(self, model: nn.Module, way: str):
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x):
        return WAYS[self.way](self.model, x)


@pytest.mark.parametrize("way", ["no_grad", "detach", "numpy"])
def test_a_student_that_passes_no_gradient_is_refused(way, student, teacher, noise):
    with pytest.raises(ValueError, match=r"^student must be computed with gradients"):
        kegfast.distill(Cut(student, way), teacher, noise, steps=1)
    data = torch.utils.data.TensorDataset(X, X[:, :4].argmax(1))
    with pytest.raises(ValueError, match=r"^model must be computed with gradients"):
        kegfast.train(Cut(student, way), data, steps=1)


def test_a_loss_that_passes_no_gradient_is_refused(student, teacher, noise):
    with pytest.raises(ValueError, match=r"^loss must be computed with gradients"):
        kegfast.distill(student, teacher, noise, loss=lambda ours, *_: ours.detach().sum(), steps=1)


@pytest.mark.parametrize("way", WAYS)
def test_boundary_samples_need_the_teachers_gradient(way, student, teacher, noise):
    with pytest.raises(ValueError, match=r"^teacher must be a model that passes gradients"):
        kegfast.distill(student, Cut(teacher, way), noise, loss="boundary", steps=1)
    x, classes = X[:9], teacher(X[:9]).argmax(1)
    with pytest.raises(ValueError, match=r"^model must be a model that passes gradients"):
        boundary.perturbations(Cut(teacher, way), x, classes, (classes + 1) % 4)


@pytest.mark.parametrize("way", WAYS)
def test_other_losses_do_not(way, student, teacher, noise):
    kegfast.distill(student, Cut(teacher, way), noise, steps=300, lr=1e-2)
    assert agreement(student, teacher) > 0.8
