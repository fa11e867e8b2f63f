"""shrink on networks small enough for tests: what it promises of any."""

import copy

import pytest
import torch
from small_models import perceptron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kegfast
from kegfast.compression.norms import has_norms
from kegfast.recovery import judge, samples, teaching
from kegfast.recovery.samples import Amounts
from kegfast.training import train

SHAPE = (1, 12, 12)


def convolutional(norms: bool) -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d if norms else lambda _: nn.Identity()
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, bias=not norms), norm(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, bias=not norms), norm(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)),
    )


def bars(n: int, seed: int = 0) -> TensorDataset:
    """Images of a bright bar at the top, bottom, left or right, by class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    images = 0.3 * torch.rand((n, *SHAPE), generator=generator)
    for image, label in zip(images, labels, strict=True):
        place = torch.randint(4, (), generator=generator)
        band = image[0] if label < 2 else image[0].T
        rows = slice(int(place), int(place) + 3)
        (band if label % 2 == 0 else band.flip(0))[rows] += 0.7
    return TensorDataset((images - 0.5) / 0.25, labels)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "norms"])
def teacher(request):
    model = convolutional(request.param)
    train(model, bars(2000), steps=250, batch_size=64, lr=3e-3)
    return model.eval()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer samples and steps, so that a run takes a second."""
    counts = samples.amounts

    def amounts(subject):
        found = counts(subject)
        return Amounts(1024, found.matched and 64, 128, 64)

    monkeypatch.setattr("kegfast.recovery.pace.amounts", amounts)
    for name in ("STRUCTURED", "GENTLE", "THOROUGH", "TABULAR"):
        monkeypatch.setattr(teaching, name, teaching.replace(getattr(teaching, name), steps=40))


def shrink(model, **options):
    return kegfast.shrink(model, SHAPE, **{"ratio": 2.0, "mean": 0.5, "std": 0.25} | options)


def agreement(student, teacher):
    images = bars(500, seed=9).tensors[0]
    with torch.no_grad():
        same = student(images).argmax(1) == teacher(images).argmax(1)
    return 100 * float(same.float().mean())


def test_the_student_is_smaller_answers_alike_and_leaves_the_model_alone(teacher):
    before = copy.deepcopy(teacher.state_dict())
    student, report = shrink(teacher.train())
    assert teacher.training
    teacher.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    size = sum(p.numel() for p in student.parameters())
    assert size <= sum(p.numel() for p in teacher.parameters()) / 2
    assert report.ratio >= 2
    assert not student.training
    assert agreement(student, teacher) > 75
    assert set(report.decisions) >= {"samples", "teaching", "normalization"}


def test_no_student_is_worse_to_its_judges_than_before_teaching(teacher, monkeypatch):
    def spoil(subject, student, pool, plan, **options):
        for parameter in student.parameters():
            parameter.data.normal_()

    monkeypatch.setattr("kegfast.recovery.pipeline.teach", spoil)
    _, report = shrink(teacher)
    assert report.chosen is report.before
    assert report.candidates[-1].divergence > report.before.divergence


def test_a_course_that_diverges_leaves_the_student_from_before(teacher, monkeypatch):
    def diverge(*args, **options):
        raise FloatingPointError("teaching: loss is nan")

    monkeypatch.setattr("kegfast.recovery.pipeline.teach", diverge)
    student, report = shrink(teacher)
    assert report.chosen is report.before
    assert all(p.isfinite().all() for p in student.parameters())


def test_the_same_seed_gives_the_same_student(teacher):
    one, other = (shrink(teacher, seed=3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_run_that_was_stopped_goes_on_to_the_same_student(teacher, tmp_path, monkeypatch):
    whole, first = shrink(teacher, out=tmp_path / "whole")
    real = teaching.distill

    def stopped(*args, **options):
        real(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "distill", stopped)
    with pytest.raises(KeyboardInterrupt):
        shrink(teacher, out=tmp_path / "parts")
    monkeypatch.setattr(teaching, "distill", real)
    made = []
    monkeypatch.setattr(samples, "match_statistics", lambda *args: made.append(args))
    again, report = shrink(teacher, out=tmp_path / "parts", resume=True)
    assert not made
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert report.to_dict()["candidates"] == first.to_dict()["candidates"]


@pytest.mark.parametrize("change", ["seed", "model", "budget"])
def test_another_run_does_not_go_on_in_its_folder(teacher, change, tmp_path):
    shrink(teacher, out=tmp_path)
    model = copy.deepcopy(teacher)
    if change == "model":
        model[0].weight.data[0, 0, 0, 0] += 1
    options = {"seed": {"seed": 5}, "budget": {"ratio": 3.0}}.get(change, {})
    with pytest.raises(ValueError, match=f"{change} was .* in the run to resume"):
        shrink(model, out=tmp_path, resume=True, **options)


def _results(folder):
    from kegfast._util.files import read_json

    return read_json(folder / "results.json")


def test_the_folder_holds_the_student_and_the_report(teacher, tmp_path):
    student, report = shrink(teacher, out=tmp_path)
    loaded = kegfast.load(tmp_path / "student.safetensors")
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(loaded(x), student(x))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("Before and after", "Samples", "<svg", "<img"))
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert _results(tmp_path)["ratio"] == report.ratio


def test_rows_of_a_table():
    model = perceptron(8, 64, 64, 3)
    student, report = kegfast.shrink(model, (8,), ratio=3.0)
    x = torch.randn(1000, 8)
    assert report.ratio >= 3
    assert float((student(x).argmax(1) == model(x).argmax(1)).float().mean()) > 0.85
    assert "normalization" not in report.decisions


def test_samples_that_are_neither_images_nor_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 12, 3))
    student, report = kegfast.shrink(model, (2, 16), ratio=2.0)
    assert student(torch.randn(4, 2, 16)).shape == (4, 3)
    assert report.ratio >= 2


def test_a_softmax_inside_is_recognized(teacher):
    model = nn.Sequential(teacher, nn.Softmax(dim=1))
    student, _ = shrink(model)
    torch.testing.assert_close(student(torch.randn(5, *SHAPE)).sum(1), torch.ones(5))
    assert agreement(student, model) > 75


@pytest.mark.parametrize(("count", "loader", "margin"), [(10, False, 3), (400, True, 0)])
def test_data_of_ones_own_do_no_harm(teacher, count, loader, margin):
    """A few change the samples of a student's steps, and no more than another seed would."""
    images = bars(count, seed=4)
    data = DataLoader(images, batch_size=32) if loader else images.tensors[0]
    without, _ = shrink(teacher, ratio=4.0)
    student, report = shrink(teacher, ratio=4.0, data=data)
    assert agreement(student, teacher) >= agreement(without, teacher) - margin
    assert str(count) in report.decisions["data"] or str(count * 3 // 4) in report.decisions["data"]


class Ramps:
    """Images that rise from one side to the other."""

    def sample(self, n):
        ramp = torch.linspace(0, 1, 12).expand(n, *SHAPE)
        turned = torch.where(torch.rand(n, 1, 1, 1) < 0.5, ramp, ramp.transpose(2, 3))
        return (turned * torch.rand(n, 1, 1, 1) - 0.5) / 0.25, None


class BareRamps(Ramps):
    """The same without a pair around them."""

    def sample(self, n):
        return super().sample(n)[0]


@pytest.mark.parametrize("source", [Ramps(), BareRamps()])
def test_a_source_of_ones_own_takes_the_place_of_artificial_samples(teacher, source):
    _, report = shrink(teacher, source=source)
    assert "given source" in report.decisions["samples"]
    assert report.ratio >= 2


def test_the_choice_asks_of_more_learning_to_be_surely_better():
    assert judge.choice([1.0, 0.95]) == 0
    assert judge.choice([1.0, 0.85]) == 1
    assert judge.choice([1.0, 0.85, 0.8]) == 1


def test_data_that_batchnorm_does_not_know_are_left_aside(teacher):
    images = torch.rand(100, *SHAPE).mul(0.02).sub(1.9)  # all but black
    student, report = shrink(teacher, data=images)
    without, _ = shrink(teacher)
    same = all(torch.equal(a, b) for a, b in zip(student.parameters(), without.parameters(), strict=True))
    assert same == has_norms(teacher) == ("left aside" in report.decisions["data"])
