"""The paper's students come out exactly: ranks, parameters, ratios, accuracies before distillation."""

import pytest
import torch
from torch import nn

from kegfast import compress, data
from kegfast.models import MLP

EVBMF = "evbmf"
STUDENTS = [  # teacher, rule, ranks, parameters, ratio, accuracy
    ("mnist", {"conv3": EVBMF}, {"conv3": (7, 11)}, 17_063, 3.62, 85.17),
    ("mnist", {"conv[23]": EVBMF}, {"conv2": (3, 4), "conv3": (7, 11)}, 15_045, 4.10, 67.35),
    ("mnist", {"conv2": EVBMF, "conv3": (5, 8)}, {"conv2": (3, 4), "conv3": (5, 8)}, 13_728, 4.49, 50.01),
    ("fashion", {"layers3.*.conv1": EVBMF}, {"0.conv1": (8, 11), "1.conv1": (15, 15)}, 123_083, 1.40, 65.09),
    ("fashion", {"layers3.*.conv2": EVBMF}, {"0.conv2": (24, 10), "1.conv2": (21, 18)}, 109_188, 1.58, 75.80),
    (
        "fashion",
        {"layers3.*": EVBMF},
        {"0.conv1": (8, 11), "1.conv1": (15, 15), "0.conv2": (24, 10), "1.conv2": (21, 18)},
        59_589,
        2.90,
        46.55,
    ),
    ("svhn", {"layers3.*.conv1": EVBMF}, {"0.conv1": (2, 2), "1.conv1": (10, 9)}, 119_928, 1.44, None),
    ("svhn", {"layers3.*.conv2": EVBMF}, {"0.conv2": (8, 7), "1.conv2": (21, 10)}, 104_580, 1.65, None),
    (
        "svhn",
        {"layers3.*": EVBMF},
        {"0.conv1": (2, 2), "1.conv1": (10, 9), "0.conv2": (8, 7), "1.conv2": (21, 10)},
        51_538,
        3.36,
        None,
    ),
]


@pytest.fixture(scope="module")
def tests(data_root):
    """The test sets by name."""
    sets = {"mnist": "mnist", "fashion": "fashion-mnist"}
    return {name: data.load(source, data_root).test.tensors for name, source in sets.items()}


@torch.inference_mode()
def accuracy(model, samples, labels):
    model.eval()
    batches = zip(samples.split(500), labels.split(500), strict=True)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(labels)


@pytest.mark.parametrize(("teacher", "rule", "ranks", "parameters", "ratio", "expected"), STUDENTS)
def test_students(teachers, tests, teacher, rule, ranks, parameters, ratio, expected):
    student, report = compress(teachers[teacher], rule)
    prefix = "" if teacher == "mnist" else "layers3."
    assert report.ranks == {prefix + name: rank for name, rank in ranks.items()}
    assert report.parameters == sum(p.numel() for p in student.parameters()) == parameters
    assert round(report.ratio, 2) == ratio
    if expected is not None:
        assert accuracy(student, *tests[teacher]) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("features", "classes", "rank", "ratio"), [(9, 7, 5, 8.17), (16, 10, 5, 8.07), (16, 26, 10, 4.13)]
)
def test_mlp_students(features, classes, rank, ratio):
    teacher = MLP(features, classes)
    ranks = {
        name: tuple(rank if width == 100 else width for width in (m.in_features, m.out_features))
        for name, m in teacher.named_modules()
        if isinstance(m, nn.Linear)
    }
    student, report = compress(teacher, ranks)
    assert round(report.ratio, 2) == ratio
    assert student.eval()(torch.randn(3, features)).shape == (3, classes)
