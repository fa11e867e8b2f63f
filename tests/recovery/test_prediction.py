"""What is foretold of a student: by experience, by the data given, or not at all."""

import pytest
import torch
from small_models import perceptron
from torch import nn

from kegfast.recovery.judge import Judge, Verdict
from kegfast.recovery.prediction import predict
from kegfast.recovery.report import Candidate
from kegfast.recovery.subject import examine

IMAGES = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
NORMS = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))


def candidate(divergence: float, agreement: float | None = None) -> Candidate:
    verdicts = {"made": Verdict(divergence, 50.0)}
    if agreement is not None:
        verdicts["data"] = Verdict(divergence, agreement)
    return Candidate("student", divergence, verdicts)


@pytest.mark.parametrize("model", [IMAGES, NORMS], ids=["plain", "norms"])
def test_the_further_from_the_teacher_the_less_agreement(model):
    subject = examine(model, (1, 8, 8))
    found = [predict(subject, candidate(divergence)) for divergence in (0.0, 0.001, 0.1, 1.0, 100.0)]
    values = [one.agreement for one in found]
    assert values == sorted(values, reverse=True)
    assert all(0 <= one.low < one.agreement < one.high <= 100 for one in found)


def test_held_out_data_are_believed_before_anything_else():
    subject = examine(IMAGES, (1, 8, 8))
    few, many = (predict(subject, candidate(9.0, 95.0), held=n) for n in (64, 1000))
    assert few.agreement == many.agreement == 95.0
    assert few.low < many.low < 95.0 < many.high < few.high
    assert "1000 samples" in many.basis


def test_what_nobody_knows_is_said_to_be_unknown():
    assert predict(examine(perceptron(8, 16, 3), (8,)), candidate(0.1)) is None
    assert predict(examine(IMAGES, (1, 8, 8)), candidate(0.1), artificial=False) is None


def test_a_judge_finds_a_model_like_itself_and_others_not():
    teacher, other = perceptron(8, 16, 3), perceptron(8, 16, 3, seed=5)
    judge = Judge(examine(teacher, (8,)), torch.randn(200, 8))
    own, foreign = (judge.verdicts(model)["made"] for model in (teacher, other))
    assert own.divergence == pytest.approx(0, abs=1e-6)
    assert own.agreement == 100
    assert foreign.divergence > 0.01
    assert foreign.agreement < 90


def test_the_more_data_the_more_they_count():
    teacher, other = perceptron(8, 16, 3), perceptron(8, 16, 3, seed=5)
    subject, made = examine(teacher, (8,)), torch.randn(200, 8)
    found = []
    for n in (0, 16, 400):
        judge = Judge(subject, made, 5 * torch.randn(n, 8))
        verdicts = judge.verdicts(other)
        real = verdicts["data"].divergence if n else verdicts["made"].divergence
        found.append(abs(judge.divergence(verdicts) - real) / abs(real - verdicts["made"].divergence + 1e-9))
    assert found[0] < 1e-6
    assert found[2] < found[1]


def test_teaching_beside_batchnorm_is_believed_less_than_a_better_start():
    subject = examine(NORMS, (1, 8, 8))
    start, fresh = candidate(1.0), predict(subject, candidate(0.1))
    taught = predict(subject, candidate(0.1), before=start)
    assert predict(subject, start).agreement < taught.agreement < fresh.agreement
    plain = examine(IMAGES, (1, 8, 8))
    assert predict(plain, candidate(0.1), before=start) == predict(plain, candidate(0.1))
