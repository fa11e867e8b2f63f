"""Objectives: the text, the sum, the regressors."""

import pytest
import torch
from torch import nn

from kegfast.distillation import Batch, Objective, Term, losses
from kegfast.distillation.objective import TERMS, parse


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    student = {"a": torch.randn(4, 3, 6, 6), "b": torch.randn(4, 5, 3, 3)}
    teacher = {"a": torch.randn(4, 3, 6, 6), "c": torch.randn(4, 5, 3, 3), "d": torch.randn(4, 8, 3, 3)}
    return Batch(
        torch.randn(4, 2), torch.tensor([0, 1, 2, 3]), torch.randn(4, 7), torch.randn(4, 7), student, teacher
    )


def test_text_becomes_terms():
    terms = parse("soft_target + rkd_distance:25+ hint@layers2.0=stage2,layers3 : 0.5")
    assert [term.name for term in terms] == ["soft_target", "rkd_distance", "hint"]
    assert [term.weight for term in terms] == [1, 25, 0.5]
    assert terms[2].layers == [("layers2.0", "stage2"), ("layers3", "layers3")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("soft_target", lambda b: losses.soft_target(b.student, b.teacher, temperature=2.0)),
        ("hard_label", lambda b: losses.hard_label(b.student, None, b.labels)),
        ("logit_regression:3", lambda b: 3 * losses.logit_regression(b.student, b.teacher)),
        ("decoupled", lambda b: losses.decoupled(b.student, b.teacher, b.labels, temperature=2.0)),
        ("rkd_angle:50", lambda b: 50 * losses.rkd_angle(b.student, b.teacher)),
        (
            "rkd_distance@b=d",
            lambda b: losses.rkd_distance(b.student_features["b"], b.teacher_features["d"]),
        ),
        ("hint@a", lambda b: losses.hint(b.student_features["a"], b.teacher_features["a"])),
        (
            "attention_transfer@a,b=d:10",
            lambda b: (
                10
                * (
                    losses.attention_transfer(b.student_features["a"], b.teacher_features["a"])
                    + losses.attention_transfer(b.student_features["b"], b.teacher_features["d"])
                )
            ),
        ),
        (
            "fsp@a,b=c",
            lambda b: losses.fsp(
                (b.student_features["a"], b.student_features["b"]),
                (b.teacher_features["a"], b.teacher_features["c"]),
            ),
        ),
    ],
)
def test_each_term_is_its_loss(batch, text, expected):
    objective = Objective(text, temperature=2.0)
    torch.testing.assert_close(objective(batch)["loss"], expected(batch))


def test_a_sum_reports_its_terms(batch):
    values = Objective("soft_target+rkd_distance:25")(batch)
    assert values.keys() == {"loss", "soft_target", "rkd_distance"}
    torch.testing.assert_close(values["loss"], values["soft_target"] + 25 * values["rkd_distance"])


def test_terms_of_one_name_are_reported_as_their_sum(batch):
    values = Objective("hint@a+hint@b=c:2")(batch)
    first, second = (Objective(text)(batch)["loss"] for text in ("hint@a", "hint@b=c"))
    torch.testing.assert_close(values, {"loss": first + 2 * second, "hint": first + second})


def test_alpha_mixes_the_labels_in(batch):
    value = Objective("soft_target", alpha=0.25, temperature=3.0)(batch)["loss"]
    expected = losses.soft_target(batch.student, batch.teacher, batch.labels, alpha=0.25, temperature=3.0)
    torch.testing.assert_close(value, expected)


def test_a_function_is_an_objective(batch):
    value = Objective(lambda student, teacher, labels: (student - teacher).abs().sum())(batch)
    torch.testing.assert_close(value, {"loss": (batch.student - batch.teacher).abs().sum()})


def test_weights_may_follow_the_run(batch):
    objective = Objective([Term("soft_target"), Term("logit_regression", lambda done: 2 - 4 * done)])
    soft, regression = (Objective(name)(batch)["loss"] for name in ("soft_target", "logit_regression"))
    torch.testing.assert_close(objective(batch, 0.25)["loss"], soft + regression)
    assert objective(batch, 0.5).keys() == {"loss", "soft_target"}  # a weight of 0 costs nothing


def test_a_hint_gets_a_regressor_where_shapes_differ(batch):
    objective = Objective("hint@a,b=d")
    objective.fit(batch.student_features, batch.teacher_features)
    assert len(objective.regressors) == 1
    (regressor,) = objective.regressors.values()
    assert isinstance(regressor, nn.Conv2d)
    objective(batch)["loss"].backward()
    assert regressor.weight.grad is not None
    expected = losses.hint(batch.student_features["a"], batch.teacher_features["a"]) + losses.hint(
        regressor(batch.student_features["b"]), batch.teacher_features["d"]
    )
    torch.testing.assert_close(objective(batch)["loss"], expected)


def test_only_some_objectives_need_the_teacher_at_each_step():
    assert not Objective("soft_target+rkd_angle").needs_teacher
    assert Objective("hint@a").needs_teacher
    assert Objective("boundary").needs_teacher


@pytest.mark.parametrize(
    "text",
    ["", "soft", "soft_target+", "soft_target:x", "hint", "fsp@a", "attention_transfer", "soft_target:"],
)
def test_bad_text_is_refused(text):
    with pytest.raises(ValueError, match=r"^loss must be"):
        Objective(text)


def test_other_bad_losses_are_refused(batch):
    with pytest.raises(TypeError, match=r"^loss must be"):
        Objective(3)
    with pytest.raises(TypeError, match=r"^loss must be"):
        Objective([])
    with pytest.raises(ValueError, match=r"^loss must be"):
        Objective([Term("unknown")])
    with pytest.raises(ValueError, match=r"^loss must be 'fsp@layer,layer'"):
        Objective([Term("fsp", layers=[("a", "a")])])
    with pytest.raises(TypeError, match=r"^weight must be"):
        Objective([Term("soft_target", "2")])
    with pytest.raises(TypeError, match=r"^the value of loss mine must be a scalar"):
        Objective([Term("mine", loss=lambda student, teacher, labels: student)])(batch)
    with pytest.raises(ValueError, match=r"^loss must be"):
        Objective("soft_target:0")(batch)


def test_every_named_loss_is_public():
    assert set(TERMS) - {"boundary"} <= set(losses.__all__)
