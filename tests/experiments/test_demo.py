"""The demo's chain at the smallest size: what it leaves behind, and that it resumes to the same table."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kegfast.compression import matching
from kegfast.experiments.demo import SOURCES, DemoConfig, run_demo
from kegfast.experiments.demo_report import demo_table, write_demo_report
from kegfast.extraction import Generators

TINY = DemoConfig(
    teacher_steps=2,
    teacher_batch=8,
    generators=2,
    generator_steps=2,
    generator_batch=4,
    ranks=(0.4, 0.1),
    pool=32,
    student_steps=2,
    student_batch=8,
    share=0.01,
    latency_batch=2,
    latency_rounds=3,
)


@pytest.fixture(scope="module", autouse=True)
def short_matching():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(TINY, out)


def accuracies(results):
    return [results["teacher"]["accuracy"], *(s["accuracy"] for s in results["students"])]


def test_results(run):
    out, results = run
    assert json.loads((out / "results.json").read_text()) == results
    assert [s["name"] for s in results["students"]] == ["S1", "S2"]
    ratios = [s["ratio"] for s in results["students"]]
    assert 1 < ratios[0] < ratios[1]
    for student in results["students"]:
        assert set(student["accuracy"]) == set(SOURCES)
        assert student["latency_ms"] > 0
    assert json.loads((out / "config.json").read_text())["pool"] == 32
    stages = {json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()}
    assert {"train", "extract", "S1 uniform", "S2 real"} <= stages
    assert stages == set(results["seconds"])
    assert not list(out.rglob("*.pt"))


def test_images(run):
    out, _ = run
    images = load_file(out / "images.safetensors")
    assert images["grid"].shape == (2, 10, 8, 1, 32, 32)
    assert images["real_mean"].shape == images["generated_mean"].shape == (10, 1, 32, 32)
    assert all(image.isfinite().all() for image in images.values())
    generators = Generators.load(out / "generators.safetensors")
    noise = torch.randn(2, 1, 10)
    made = generators.generate(torch.tensor([[3], [3]]), noise)
    assert made.shape == (2, 1, 1, 32, 32)


def test_students_differ_by_source(run):
    out, _ = run
    taught = [source for source in SOURCES if source != "shrink"]  # its layers are others
    weights = [load_file(out / f"students/S2-{source}.safetensors")["linear.weight"] for source in taught]
    for i, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:i])


@pytest.mark.parametrize(
    "lost",
    [
        ["results.json", "cells.json"],
        ["students/S1-kegnet.safetensors", "cells.json"],
        ["generators.safetensors"],
    ],
    ids=lambda names: names[0],
)
def test_resume_gives_the_same_table(run, lost):
    out, results = run
    for name in lost:
        (out / name).unlink()
    again = run_demo(TINY, out, resume=True)
    assert accuracies(again) == accuracies(results)


def test_interrupted_stage_continues_from_its_checkpoint(run, tmp_path, monkeypatch):
    _, results = run
    from kegfast.training import loop

    def stop_after_first_step(self):
        self.save()
        if self.identity["label"] == "S1 kegnet":
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "due", stop_after_first_step)
        with pytest.raises(KeyboardInterrupt):
            run_demo(TINY, tmp_path)
    assert (tmp_path / "students/S1-kegnet.pt").exists()
    assert accuracies(run_demo(TINY, tmp_path, resume=True)) == accuracies(results)


def test_another_configuration_is_refused_on_resume(run):
    out, _ = run
    with pytest.raises(ValueError, match=r"cells\.json"):
        run_demo(DemoConfig(seed=1), out, resume=True)


def test_table(run):
    _, results = run
    header, rows = demo_table(results)
    assert header == ["", "teacher", "S1", "S2"]
    assert all(len(row) == 4 for row in rows)
    assert len(rows) == 3 + len(SOURCES)


def test_report(run):
    out, results = run
    page = write_demo_report(out).read_text()
    for student in results["students"]:
        assert f"{student['accuracy']['kegnet']:.1f}" in page
    assert page.count("<img") == 2 + 2  # a grid per generator; generated and real means
    assert page.count("<svg") == 2 + 2 + 2  # accuracy, latency; teacher, extraction; a loss chart per student
