"""What the loop refuses."""

import pytest
import torch
import torch.multiprocessing
from small_models import perceptron
from torch import nn

import kegfast


def test_different_devices_are_refused(student, teacher, noise):
    with pytest.raises(ValueError, match=r"^teacher must be on the student's device cpu"):
        kegfast.distill(student, teacher.to("meta"), noise)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"optimizer": "adagrad"}, "optimizer"),
        ({"optimizer": lambda parameters: None}, "optimizer"),
        ({"device": "abacus"}, "device"),
        ({"loss": "boundary@0=nowhere"}, "layer"),
        ({"schedule": "step"}, "schedule"),
        ({"student_batchnorm": "off"}, "student_batchnorm"),
        ({"loss": "kd"}, "loss"),
        ({"loss": "hint@nowhere"}, "layer"),
        ({"temperature": -1}, "temperature"),
        ({"alpha": 0.5}, "labels"),
        ({"teacher": perceptron(8, 3)}, "teacher"),
        ({"teacher": None}, "teacher"),
        ({"source": 5}, "source"),
        ({"student": 5}, "student"),
        ({"student": nn.Flatten()}, "student"),
    ],
)
def test_bad_arguments_are_named(student, teacher, noise, options, argument):
    arguments = {"student": student, "teacher": teacher, "source": noise, "steps": 1, **options}
    with pytest.raises((ValueError, TypeError), match=f"^{argument} must be"):
        kegfast.distill(**arguments)
    assert teacher.training


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": Pair(8, 4)}, TypeError, "teacher must be a model that gives logits"),
        ({"student": Pair(8, 4)}, TypeError, "student must be a model that gives logits"),
        ({"teacher": nn.Linear(8, 4).double()}, ValueError, "source must be what the teacher takes"),
        ({"student": nn.Linear(7, 4)}, ValueError, "source must be what the student takes"),
        ({"source": torch.ones(5, 7)}, ValueError, "source must be what the teacher takes"),
    ],
)
def test_models_and_sources_that_do_not_fit_are_refused(student, teacher, noise, change, error, message):
    with pytest.raises(error, match=message):
        kegfast.distill(**({"student": student, "teacher": teacher, "source": noise} | change), steps=1)


def test_a_teacher_cannot_teach_itself(teacher, noise):
    with pytest.raises(ValueError, match=r"^student must be another model"):
        kegfast.distill(teacher, teacher, noise)


class Broken(nn.Module):
    def forward(self, x):
        return x[:, :4] / 0.0


NAN = torch.full((4, 8), float("nan"))


@pytest.mark.parametrize("source", [NAN, kegfast.distillation.Noisy(NAN)], ids=["in memory", "drawn"])
@pytest.mark.parametrize("steps", [1, 25])
def test_samples_that_are_no_numbers_are_named(student, teacher, source, steps):
    with pytest.raises(FloatingPointError, match="source must give finite values, got NaN or infinite ones"):
        kegfast.distill(student, teacher, source, steps=steps)


def test_one_sample_that_is_no_number_is_found_later(student, teacher):
    samples = torch.randn(2000, 8)
    samples[1234, 5] = float("inf")
    with pytest.raises(FloatingPointError, match="source must give finite values"):
        kegfast.distill(student, teacher, samples, steps=50, log_every=50)


def test_answers_that_are_no_numbers_are_named(student, noise):
    with pytest.raises(FloatingPointError, match="teacher must give finite values"):
        kegfast.distill(student, Broken(), noise, steps=1)


def test_a_run_that_diverges_is_told_apart(student, teacher, noise):
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        kegfast.distill(student, teacher, noise, loss="logit_regression", optimizer="sgd", lr=1e6, steps=50)
