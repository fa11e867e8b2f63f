"""The published protocol: every number of the authors' program, and how its students are taught."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import by_machine
from kegfast.experiments import sources as sources_module
from kegfast.experiments.epochs import Epochs, teach
from kegfast.experiments.paper import PAPERS, PROTOCOLS, Config
from kegfast.experiments.pictures import grid, walk
from kegfast.experiments.reproduce import reproduce
from kegfast.experiments.sources import Sources
from kegfast.extraction import RECIPES, Generators
from kegfast.training.loop import seeded

TINY = {"pool": 640, "steps": 20, "generator_steps": 2, "generator_batch": 8, "probe": 20}


def test_budget_is_the_published():
    budget = PROTOCOLS["paper"]
    assert (budget["generator_steps"], budget["generator_batch"]) == (20_000, 256)
    assert budget["pool"] == 5 * 6_400
    assert (budget["steps"], budget["batch_size"]) == (200_000, 64)
    assert Config(1, 1).temperature == 1.0
    assert RECIPES["paper"].labels == "one-hot"
    assert not RECIPES["paper"].cosine


@pytest.mark.parametrize(
    ("dataset", "beta", "generator_lr", "lr", "noise_lr"),
    [
        ("mnist", 0, 1e-3, 1e-5, 1e-6),
        ("fashion-mnist", 10, 1e-2, 1e-4, 1e-4),
        ("svhn", 1, 1e-2, 1e-4, 1e-4),
        ("pendigits", 0, 1e-4, 1e-4, 1e-4),
        ("letter", 0, 1e-4, 1e-4, 1e-4),
        ("shuttle", 0, 1e-4, 1e-4, 1e-4),
    ],
)
def test_weights_and_rates_are_the_published(dataset, beta, generator_lr, lr, noise_lr):
    own = PAPERS[dataset].published
    assert (own.beta, own.generator_lr, own.lr, own.noise_lr) == (beta, generator_lr, lr, noise_lr)
    taught = own.epochs("kegnet")
    assert (taught.rate, taught.steps(32_000), taught.most) == (lr, 500, 400)
    for noise in ("uniform", "gaussian"):
        plan = own.epochs(noise)
        assert (plan.rate, plan.steps(6_400), plan.most) == (noise_lr, 100, 1_000)
    for plan in (taught, own.epochs("gaussian")):
        assert (plan.least, plan.patience, plan.batch_size, plan.shuffle) == (100, 50, 64, False)


def test_generators_are_trained_as_published(table_paper, tmp_path, monkeypatch):
    asked = {}
    whole = sources_module.extract

    def extract(teacher, **options):
        asked.update(options)
        return whole(teacher, **options)

    monkeypatch.setattr(sources_module, "extract", extract)
    reproduce("pendigits", tmp_path, seeds=[0], methods=["kegnet"], protocol="paper", **TINY)
    recipe = asked["recipe"]
    assert asked["faithful"]
    assert (recipe.alpha, recipe.beta, recipe.lr) == (1.0, 0.0, 1e-4)
    assert [term.name for term in recipe.terms()] == ["classification", "reconstruction"]
    assert len(Generators.load(tmp_path / "generators-0.safetensors")) == 5


def test_samples_follow_generator_by_generator(table_paper, tmp_path):
    result = reproduce(
        "pendigits", tmp_path, seeds=[0], methods=["kegnet", "gaussian"], protocol="paper", **TINY
    )
    sources: Sources = result.study.sources(0)
    assert len(sources.pool("gaussian")[0]) == 640 // 5
    pool = sources.pool("kegnet")[0].samples
    generators = sources.generators()
    assert generators.labels == "one-hot"
    with seeded(0):
        mixed = generators.sample(20)
    with seeded(0):
        ordered = generators.sample(20, shuffle=False)
    assert len(pool) == 640
    assert not torch.equal(mixed[0], ordered[0])
    torch.testing.assert_close(mixed[0].sum(0), ordered[0].sum(0))
    assert sorted(mixed[1].tolist()) == sorted(ordered[1].tolist())


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


def make_student():
    with seeded(3):
        return Student()


def drawn(n=140):
    with seeded(1):
        return torch.randn(n, 4), torch.randn(n, 3)


def run(student, plan, divergences=None, checkpoint=None, most=7, **options):
    found = iter(divergences or [])
    measure = (lambda model: next(found)) if divergences else (lambda model: 1.0)
    return teach(
        student, *drawn(), plan, measure, lambda model: 50.0, most=most, checkpoint=checkpoint, **options
    )


def test_students_see_the_samples_in_order_at_a_constant_rate_in_train_mode():
    taught, own = make_student(), make_student()
    samples, logits = drawn()
    run(taught, Epochs(1e-2, most=3), [3.0, 2.0, 1.0], most=3)
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        for at in (0, 64):  # the 12 that are left over fill no batch
            optimizer.zero_grad()
            target = logits[at : at + 64].softmax(1)
            F.kl_div(own(samples[at : at + 64]).log_softmax(1), target, reduction="batchmean").backward()
            optimizer.step()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(taught.state_dict()[name], value)


@pytest.mark.parametrize(
    ("divergences", "least", "patience", "best", "count"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.2], 2, 2, 7, 7),
        ([3, 1, 2, 2, 2, 0, 0], 2, 3, 2, 5),
        ([3, 1, 2, 2, 2, 0, 0], 6, 3, 6, 7),
        ([1, 2, 2, 2, 2, 2, 2], 4, 2, 1, 4),
        ([1, 2, 2, 2, 2, 2, 2], 1, None, 1, 7),
    ],
    ids=["to the last", "patience", "at least so many, and one is better", "at least so many", "no patience"],
)
def test_teaching_ends_when_nothing_better_comes_and_keeps_the_best(
    divergences, least, patience, best, count
):
    student, same = make_student(), make_student()
    plan = Epochs(1e-2, most=7, least=least, patience=patience)
    found = run(student, plan, divergences)
    assert (found.epoch, found.epochs) == (best, count)
    run(same, plan, list(range(best, 0, -1)), most=best)  # whose last is its best
    for name, value in same.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


def test_a_killed_student_goes_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr("kegfast.training.loop.CHECKPOINT_SECONDS", 0.0)
    divergences = [3.0, 1.0, 2.0, 2.5, 0.5, 2.0, 2.0]
    whole, parts = make_student(), make_student()
    plan = Epochs(1e-2, most=7, least=3, patience=3, shuffle=True)
    first = run(whole, plan, divergences)
    path = tmp_path / "student.pt"
    with pytest.raises((StopIteration, RuntimeError)):
        run(parts, plan, divergences[:4], path)  # the end of the list stands for the kill
    again = run(make_student(), plan, divergences[4:], path)
    assert asdict(again) == asdict(first)
    finished = make_student()
    assert asdict(run(finished, plan, [], path)) == asdict(first)
    for name, value in whole.state_dict().items():
        assert torch.equal(finished.state_dict()[name], value)


def test_the_test_set_is_looked_at_early_then_seldom_and_decides_nothing():
    found = run(make_student(), Epochs(1e-2, most=7, look=6), list(range(7, 0, -1)))
    assert [steps for steps, _ in found.curve] == [2 * n for n in (1, 2, 3, 4, 5, 6, 7)]
    found = run(make_student(), Epochs(1e-2, most=9, look=100), list(range(9, 0, -1)), most=8)
    assert [steps for steps, _ in found.curve] == [2 * n for n in (1, 2, 3, 4, 5, 8)]


def test_rows_name_the_choice_and_what_was_measured_where(table_paper, tmp_path):
    options = {"seeds": [0], "methods": ["tucker-only", "gaussian"], "protocol": "paper", **TINY}
    result = reproduce("pendigits", tmp_path, **options)
    cell = result.study.ledger.cells["s1/paper/gaussian/0"]
    assert cell["epochs"] == 10  # 20 steps, 2 an epoch
    assert cell["chosen"] == 1
    row = result.rows[1]
    assert row["oracle"] == [max(cell["accuracy"] + [accuracy for _, accuracy in cell["curve"]])]
    assert row["measured"]["processor"]
    assert "chosen without data" in result.report.read_text(encoding="utf-8")
    stages = [json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert stages == ["s1/paper/gaussian/0"] * 10


@pytest.mark.parametrize(
    ("options", "message"), [({"methods": ["kegfast"]}, "methods"), ({"ranks": ["budget"]}, "ranks")]
)
def test_what_was_not_published_has_no_published_protocol(options, message, table_paper, tmp_path):
    with pytest.raises(ValueError, match=f"{message} must be"):
        reproduce("pendigits", tmp_path, protocol="paper", **options)


def test_rows_of_two_machines_are_not_in_one_table():
    here = {"processor": "A", "isa_active": "avx2", "date": "2026-01-02"}
    rows = [{"n": 1, "measured": here}, {"n": 2}, {"n": 3, "measured": here | {"date": "2026-01-03"}}]
    facts = {"processor": "B", "isa_active": "amx", "date": "2026-01-01", "torch": "2"}
    first, second = by_machine(rows, facts)
    assert [row["n"] for row in first[0]] == [1, 3]
    assert first[1] == {
        "processor": "A",
        "isa_active": "avx2",
        "date": "2026-01-02 to 2026-01-03",
        "torch": "2",
    }
    assert second == ([{"n": 2}], facts)
    assert by_machine({"x": 1, "y": {"z": 2}}, facts) == [({"x": 1, "y": {"z": 2}}, facts)]


def test_pictures_show_all_generators_side_by_side_and_a_walk_from_one_label_to_another():
    with seeded(0):
        made = Generators(3, 4, (1, 16, 16), noise_size=5)
    draw = torch.Generator().manual_seed(0)
    shown, walked = grid(made, draw, columns=2), walk(made, draw, columns=5)
    assert shown.shape == (4, 6, 1, 16, 16)
    assert walked.shape == (3, 5, 1, 16, 16)
    draw.manual_seed(0)
    noise = torch.randn(1, 2, 5, generator=draw).expand(3, -1, -1)
    second = made.generate(torch.full((3, 2), 1), noise)  # of label 1
    torch.testing.assert_close(shown[1], second.flatten(0, 1))
    noise = torch.randn(1, 1, 5, generator=draw).expand(3, -1, -1)
    for at, label in ((0, 0), (-1, 3)):
        torch.testing.assert_close(walked[:, at], made.generate(torch.full((3, 1), label), noise)[:, 0])


def test_generators_of_another_run_teach_students_again(table_paper, tmp_path, monkeypatch):
    options = {"seeds": [0], "methods": ["kegnet"], "protocol": "paper", **TINY}
    first = reproduce("pendigits", tmp_path / "first", **options)
    (tmp_path / "second").mkdir()
    for name in ("generators-0.safetensors", "teacher.safetensors"):
        (tmp_path / "second" / name).write_bytes((tmp_path / "first" / name).read_bytes())
    monkeypatch.setattr(sources_module, "extract", None)
    second = reproduce("pendigits", tmp_path / "second", **options)
    assert second.rows[0]["accuracy"] == first.rows[0]["accuracy"]
    assert "5 generators" in second.report.read_text(encoding="utf-8")


def test_noise_is_taught_without_generators(table_paper, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "extract", None)
    reproduce("pendigits", tmp_path, seeds=[0], methods=["gaussian"], protocol="paper", **TINY)
