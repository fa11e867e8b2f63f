"""The experiments of distillation, on a few blobs instead of MNIST: they run, resume and make sense."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import tables
from kegfast.cli import main
from kegfast.data.splits import DataInfo, Samples, Splits
from kegfast.experiments import boundary, ensemble, few_data, hinton, lenets, missing, perceptrons, trial


def blobs(side: int) -> Splits:
    """Ten classes, each one bright square of its own."""
    info = DataInfo("mnist", 10, (1, side, side), (0.1,), (0.3,))

    def part(count: int, seed: int) -> Samples:
        generator = np.random.default_rng(seed)
        labels = np.arange(count) % 10
        images = generator.normal(0, 0.3, (count, 1, side, side)).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[0, 8 * row : 8 * row + 4, 7 * column : 7 * column + 4] += 3
        return Samples(images, labels, info)

    return Splits(part(600, 0), part(100, 1), part(200, 2))


BUDGET = {"batch_size": 20, "lr": 3e-3}
STUDENTS = hinton.Students(
    **BUDGET,
    teacher_units=64,
    student_units=64,
    jitter=0.5,
    turn=1,
    zoom=0.01,
    teacher_epochs=5,
    student_epochs=5,
    amp=False,
)
SEVERAL = ensemble.Config(
    **BUDGET, share=0.5, members=2, units=32, member_epochs=10, student_steps=150, amp=False
)
MISSING = missing.Config(**BUDGET, temperature=4.0, units=64, epochs=5, amp=False)
HINTON = hinton.Config((0,), STUDENTS, MISSING, SEVERAL)


def test_hinton(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptrons, "load_entry", lambda entry, root: blobs(entry.info.sample_shape[1]))
    found = hinton.run(tmp_path, config=HINTON)
    for name in (
        "teacher", "student alone", "distilled", "one network", "ensemble", "distilled from the ensemble",
    ):  # fmt: skip
        assert 0 <= found[name]["mean"] < 20, name
    before, after = (found[f"7 and 8 only: errors{when}"]["mean"] for when in ("", " after the shift"))
    assert after < before
    errors = {"teacher": 67, "student alone": 146, "distilled": 88, "distilled on moved images": 83}
    errors |= {"one network": 200, "ensemble": 150, "distilled from the ensemble": 160}
    shown = found | {name: {"mean": float(n), "std": 1.5, "n": 3} for name, n in errors.items()}
    table = tables.hinton(shown)
    for row in (
        "| student alone | 146 | 146.0 ± 1.5 | 3 |",
        "| distilled: percent of the errors alone, 60 at most | 60.3 | no |",
        "| distilled: errors more than the teacher, 15 at most | 21 | no |",
        "| distilled on moved images: percent of the errors alone, 60 at most | 56.8 | yes |",
        "| ensemble: percent of its gain kept by one student, 80 at least | 80 | yes |",
    ):
        assert row in table
    cells = json.loads((tmp_path / "students.json").read_text())["cells"]
    assert cells["shared: teacher"] == found["teacher"]["mean"]
    monkeypatch.setattr(perceptrons, "network", None)  # all is in the files
    assert hinton.run(tmp_path, config=HINTON) == found
    with pytest.raises(ValueError, match=r"ensemble.json must be results of"):
        hinton.run(tmp_path, config=replace(HINTON, several=replace(SEVERAL, units=33)))
    with pytest.raises(ValueError, match=r"students.json must be results of"):
        hinton.run(tmp_path, config=replace(HINTON, students=replace(STUDENTS, alpha=0.5)))


def test_images_are_moved_turned_and_scaled_within_their_limits():
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 14, 20] = 1.0
    images = image.expand(500, -1, -1, -1)

    def centers(**limits):
        torch.manual_seed(0)
        still = {"jitter": 0.0, "turn": 0.0, "zoom": 0.0}
        moved = hinton._mover(replace(STUDENTS, **(still | limits)))(images)[:, 0]
        position = torch.arange(28) - 13.5
        mass = moved.sum(dim=(1, 2))
        return (moved.sum(dim=1) @ position) / mass, (moved.sum(dim=2) @ position) / mass

    x, y = centers()
    torch.testing.assert_close(torch.stack([x, y]), torch.tensor([[6.5], [0.5]]).expand(2, 500))
    for offset in [x - 6.5 for x in centers(jitter=2)[:1]] + [centers(jitter=2)[1] - 0.5]:
        assert 1.8 < offset.abs().max() < 2.01
    x, y = centers(turn=10)
    angle = torch.rad2deg(torch.atan2(y, x) - torch.atan2(torch.tensor(0.5), torch.tensor(6.5)))
    assert 8 < angle.max() < 12
    x, _ = centers(zoom=0.1)
    assert 5.6 < x.min() < 6.1
    assert 6.9 < x.max() < 7.4


def test_the_shift_makes_classes_as_frequent_as_the_teacher_finds_them():
    torch.manual_seed(0)
    teacher = torch.randn(500, 10)
    student = teacher.clone()
    student[:, 3] -= 4
    shift = missing._balance(student, teacher, [3])
    student[:, 3] += shift
    often = (teacher.argmax(1) == 3).sum().item()
    assert (student.argmax(1) == 3).sum().item() == pytest.approx(often, abs=1)


def test_boundary(tmp_path, monkeypatch):
    monkeypatch.setattr(boundary.data, "load", lambda name, root: blobs(32))
    config = boundary.Config(
        seeds=(0,),
        comparison=boundary.Comparison(**BUDGET, teacher_epochs=10, steps=60, samples=60),
        few=few_data.Config(
            **BUDGET, teacher_epochs=10, shares=(0.1,), steps=60, methods=("alone", "soft_target", "hint")
        ),
    )
    found = boundary.run(tmp_path, config=config)
    assert found["LeNet5: accuracy"]["mean"] > 95
    assert found["10 %, alone"]["mean"] > 50
    assert found["10 %, soft_target"]["mean"] > 50
    for teacher, method in itertools.product(lenets.TEACHERS, boundary.COMPARED):
        for measure in ("MagSim", "AngSim"):
            assert 0.5 < found[f"{teacher}, {method}: {measure}"]["mean"] <= 1
        assert found[f"{teacher}, {method}: length"]["mean"] > 0
    assert found["LeNet5, percent of bases accepted"]["mean"] > 50
    assert found["LeNet5, percent of the accepted across"]["mean"] == 100
    assert len(list(tmp_path.glob("*.hint.pt"))) == 1
    assert len(list(tmp_path.glob("*-alone.pt"))) == 2  # one for both teachers, one of little data
    monkeypatch.setattr(lenets, "train", None)  # all is in the files
    assert boundary.run(tmp_path, config=config) == found
    table = tables.boundary(found)
    assert f"| alone | {found['10 %, alone']['mean']:.2f} |" in table
    gain = found["10 %, hint"]["mean"] - found["10 %, alone"]["mean"]
    assert f"above the student alone | {gain:.3g} | {'yes' if gain > 0 else 'no'} |" in table


def test_a_part_has_equally_many_of_each_class():
    part = trial.part(blobs(32).train, 0.1, seed=0)
    assert torch.bincount(part.tensors[1]).tolist() == [6] * 10
    other = trial.part(blobs(32).train, 0.1, seed=1)
    assert not torch.equal(part.tensors[0], other.tensors[0])


def test_the_command_runs_and_resumes_them(tmp_path, monkeypatch, capsys):
    calls = []

    def run(output, root, config, progress):
        calls.append((output, root, config.seeds))
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "students.json").write_text("{}")
        return {"distilled": {"mean": 74.0, "std": 1.5, "n": 2}}

    monkeypatch.setattr(hinton, "run", run)
    command = ["reproduce", "hinton", "--seeds", "0,1", "--out", str(tmp_path / "out"), "--root", "data"]
    assert main(command) == 0
    assert calls == [(tmp_path / "out", Path("data"), (0, 1))]
    assert "74.00" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["results"]["distilled"]["mean"] == 74
    assert summary["config"]["seeds"] == [0, 1]
    assert main(command) == 2  # the folder has results, and --resume was not given
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--resume", "--steps", "5"]) == 2
    assert "steps must be left out for hinton" in capsys.readouterr().err
