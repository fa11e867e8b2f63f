import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kegfast import compression, data
from kegfast._util.files import save_tensors
from kegfast._util.statistics import binomial_interval
from kegfast.cli import main
from kegfast.compression import matching
from kegfast.data.splits import DataInfo
from kegfast.experiments import sources as sources_module
from kegfast.experiments import study as study_module
from kegfast.experiments import tables
from kegfast.experiments.paper import METHODS, PAPERS, Config, paper, schedule
from kegfast.experiments.reproduce import reproduce
from kegfast.experiments.sources import MADE_OF, PROBES
from kegfast.experiments.study import BUDGETED, Study, cell_name
from kegfast.recovery import samples as samples_module

TINY = {"pool": 64, "steps": 3, "batch_size": 16, "generator_steps": 2, "generator_batch": 8, "probe": 20}


def numbers(result):
    """The rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.rows]


@pytest.mark.parametrize(
    ("dataset", "student", "parameters", "ratio"),
    [
        ("mnist", 1, 17_063, 3.62),
        ("mnist", 2, 15_045, 4.10),
        ("mnist", 3, 13_728, 4.49),
        ("fashion-mnist", 1, 123_083, 1.40),
        ("fashion-mnist", 2, 109_188, 1.58),
        ("fashion-mnist", 3, 59_589, 2.90),
        ("svhn", 1, 119_928, 1.44),
        ("svhn", 2, 104_580, 1.65),
        ("svhn", 3, 51_538, 3.36),
    ],
)
def test_students_have_the_published_size(dataset, student, parameters, ratio):
    experiment = paper(dataset)
    report = compression.compress(experiment.build(), dict(experiment.students[student].ranks))[1]
    assert report.parameters == parameters
    assert round(report.ratio, 2) == ratio


@pytest.mark.parametrize(("dataset", "ratio"), [("shuttle", 8.17), ("pendigits", 8.07), ("letter", 4.13)])
def test_students_of_tables_have_about_the_published_size(dataset, ratio):
    experiment = paper(dataset)
    report = compression.compress(experiment.build(), dict(experiment.students[1].ranks))[1]
    assert report.ratio == pytest.approx(ratio, rel=0.035)


def test_table_and_report_of_a_tabular_set(table_paper, tmp_path):
    result = reproduce("pendigits", tmp_path, seeds=[0, 1], **TINY)
    methods = [name for name in METHODS if name != "procedural"]
    assert [(row["ranks"], row["method"]) for row in result.rows] == [
        *(("paper", method) for method in methods),
        *(("budget", method) for method in BUDGETED),
    ]
    for row in result.rows:
        assert len(row["accuracy"]) == 2
        assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 2)
        assert all(best >= own for best, own in zip(row["oracle"], row["accuracy"], strict=True))
        assert row["samples"] == (0 if row["method"] == "tucker-only" else 64)
        assert row["published"] == table_paper.students[1].published.get(row["method"])
    own, budget = result.rows[0], result.rows[len(methods)]  # both of the method "tucker-only"
    assert 0.9 * own["params"] < budget["params"] <= own["params"]
    assert tables.table(result.study, result.rows).row_count == len(result.rows) + 2
    page = result.report.read_text(encoding="utf-8")
    assert "generators, 2 steps" in page
    assert "tucker-only" in page
    json.dumps(result.rows, allow_nan=False)


def test_a_second_call_computes_nothing(table_paper, tmp_path, monkeypatch):
    options = {"seeds": [0], "methods": ["gaussian"], "ranks": ["paper"], **TINY}
    first = reproduce("pendigits", tmp_path, **options)
    monkeypatch.setattr(study_module, "distill", None)
    left = tmp_path / "s1-paper-gaussian-0-leg0.pt"
    left.touch()  # as a kill leaves it between a result and the end of its checkpoints
    assert reproduce("pendigits", tmp_path, **options).rows == first.rows
    assert not left.exists()


def test_an_interrupted_run_goes_on_to_the_same_table(table_paper, tmp_path, monkeypatch):
    options = {"seeds": [0], "methods": ["uniform", "kegnet", "oracle"], **TINY}
    whole = reproduce("pendigits", tmp_path / "whole", **options)
    calls = []

    def stopped(*args, **kwargs):
        calls.append(kwargs["label"])
        if len(calls) == 4:  # as by a kill: what the call wrote is there, its result is lost
            distill(*args, **kwargs)
            raise KeyboardInterrupt
        return distill(*args, **kwargs)

    distill = study_module.distill
    monkeypatch.setattr(study_module, "distill", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce("pendigits", tmp_path / "parts", **options)
    resumed = reproduce("pendigits", tmp_path / "parts", **options)
    assert numbers(resumed) == numbers(whole)
    assert not list((tmp_path / "parts").glob("*.pt"))


def test_time_that_is_up_leaves_cells_for_later(table_paper, tmp_path):
    options = {"seeds": [0], "methods": ["tucker-only", "gaussian"], "ranks": ["paper"], **TINY}
    result = reproduce("pendigits", tmp_path, seconds=0, **options)
    assert result.rows == []
    assert result.left == ["s1/paper/tucker-only/0", "s1/paper/gaussian/0"]
    assert len(reproduce("pendigits", tmp_path, **options).rows) == 2


def test_another_budget_does_not_mix_with_old_results(table_paper, tmp_path):
    options = {"seeds": [0], "methods": ["tucker-only"], "ranks": ["paper"]}
    reproduce("pendigits", tmp_path, **options, **TINY)
    with pytest.raises(ValueError, match=r"cells\.json"):
        reproduce("pendigits", tmp_path, **options, **TINY | {"steps": 4})


@pytest.mark.parametrize(
    ("divergence", "kept"),
    [([2.0, 1.0], 1), ([1.0, 0.95], 0), ([1.0, 1.2], 0), ([1.0, 0.89], 1)],
    ids=["closer", "hardly closer", "further", "surely closer"],
)
def test_students_are_chosen_by_divergence_and_not_by_accuracy(
    table_paper, tmp_path, monkeypatch, divergence, kept
):
    found = iter(divergence)
    accuracy = iter([99.0, 20.0, 80.0])  # the teacher's, then those of the start and of the only leg
    monkeypatch.setattr(Study, "accuracy", lambda self, model: next(accuracy))
    monkeypatch.setattr(Study, "_divergence", lambda self, student, judge: next(found))
    options = {"seeds": [0], "methods": ["gaussian"], "ranks": ["paper"]}
    (row,) = reproduce("pendigits", tmp_path, **options, **TINY).rows
    assert row["accuracy"] == [[20.0, 80.0][kept]]
    assert row["oracle"] == [80.0]
    assert 0 <= row["agreement"][0] <= 100


@pytest.fixture
def images(tmp_path, make_data):
    experiment = paper("mnist")
    info = data.describe("mnist")
    torch.manual_seed(0)
    return Study(experiment, info, make_data(info, 40), experiment.build(), tmp_path, Config(**TINY))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "tucker-only"])
def test_no_source_judges_its_own_students(images, method):
    sources = images.sources(0)
    probes = sources.probes(method)
    assert set(probes) == set(PROBES) - set(MADE_OF.get(method, (method,)))
    assert all(samples.shape == (20, 1, 32, 32) for samples in probes.values())
    pool, seconds = sources.pool(method)
    assert len(pool) == 64
    assert seconds > 0
    for samples in probes.values():
        assert not any(torch.equal(one, other) for one in samples for other in pool.samples)


def test_judges_are_held_out_and_among_them_some_of_every_class(images):
    judge = images.sources(0).judge()
    assert judge.shape == (20, 1, 32, 32)
    assert torch.equal(judge, images.sources(0).judge())
    with torch.no_grad():
        labels = torch.arange(5) % 10
        logits = images.teacher(judge[-5:])  # the last kind is moved towards the classes in turn
        before = images.teacher(images.sources(0).draw("procedural", 5))
    losses = [torch.nn.functional.cross_entropy(given, labels) for given in (before, logits)]
    assert losses[1] < losses[0]
    pool, _ = images.sources(0).pool("kegfast")
    assert not any(torch.equal(one, other) for one in judge for other in pool.samples)
    assert images._divergence(images.teacher, judge) == pytest.approx(0, abs=1e-6)


def test_image_methods_end_in_rows_with_their_weights(images):
    assert images.run([3], [0], ["tucker-only", "procedural", "kegfast"], ["paper"]) == []
    found = tables.rows(images, [3], [0])
    assert [row["method"] for row in found] == ["tucker-only", "procedural", "kegfast"]
    for row in found:
        saved = compression.load(images.weights(cell_name(3, "paper", row["method"], 0)))
        assert images.accuracy(saved) == row["accuracy"][0]


def test_untaught_students_are_evaluated_once(images, monkeypatch):
    seen = []
    monkeypatch.setattr(Study, "accuracy", lambda self, model: float(seen.append(model) or len(seen)))
    images.run([3], [0], ["tucker-only", "uniform", "procedural"], ["paper"])
    first = [images.ledger.cells[cell_name(3, "paper", name, 0)] for name in ("tucker-only", "procedural")]
    assert first[0]["accuracy"] == [1.0]
    assert first[1]["accuracy"] == [1.0, 2.0 + len(schedule(images.sources(0).subject, "uniform").rates)]


def test_without_data_there_is_agreement_only(tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_tensors(weights, paper("svhn").build().state_dict())
    options = {"students": [1], "seeds": [0], "ranks": ["paper"], "methods": ["uniform", "oracle"]}
    result = reproduce("svhn", tmp_path / "run", root=tmp_path, teacher=weights, **options, **TINY)
    (row,) = result.rows
    assert row["method"] == "uniform"
    assert "accuracy" not in row
    assert 0 <= row["agreement"][0] <= 100
    assert "no test set" in result.report.read_text(encoding="utf-8")


def test_a_teacher_cannot_be_trained_without_data(tmp_path):
    with pytest.raises(ValueError, match="teacher must be given"):
        reproduce("svhn", tmp_path / "run", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar"}, "dataset"),
        ({"students": [4]}, "students"),
        ({"methods": ["magic"]}, "methods"),
        ({"methods": []}, "methods"),
        ({"ranks": ["mine"]}, "ranks"),
    ],
)
def test_bad_arguments_are_named(options, message, tmp_path, fake_data):
    with pytest.raises(ValueError, match=f"{message} must be"):
        reproduce(**{"dataset": "pendigits", "output": tmp_path, **options})


def test_info_of_the_experiments_fits_their_teachers():
    for experiment in PAPERS.values():
        info: DataInfo = data.describe(experiment.dataset)
        with torch.no_grad():
            logits = experiment.build().eval()(torch.zeros(2, *info.sample_shape))
        assert logits.shape == (2, info.num_classes)


def test_command_prints_the_table_and_resumes_only_when_asked_to(table_paper, tmp_path, capsys):
    out, rows_file = tmp_path / "run", tmp_path / "rows.json"
    command = ["reproduce", "pendigits", "--seeds", "0", "--recipe", "tucker-only,gaussian"]
    command += [
        "--ranks",
        "paper",
        "--pool",
        "64",
        "--steps",
        "3",
        "--out",
        str(out),
        "--json",
        str(rows_file),
    ]
    assert main(command) == 0
    assert "gaussian" in capsys.readouterr().out
    written = json.loads(rows_file.read_text(encoding="utf-8"))
    assert [row["method"] for row in written["rows"]] == ["tucker-only", "gaussian"]
    assert written["build"]["torch"] == torch.__version__
    assert (out / "report.html").exists()
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert json.loads(rows_file.read_text(encoding="utf-8"))["rows"] == written["rows"]


def test_default_recipe_starts_from_factors_solved_on_leaves(images):
    plain, solved = images.starts(3, "budget", "kegfast", 0)
    assert len(images.starts(3, "budget", "procedural", 0)) == 1
    samples = images.sources(0).draw("procedural", 200)
    with torch.no_grad():
        wanted = images.teacher(samples)
        error = [float((model.eval()(samples) - wanted).square().mean()) for model in (plain, solved)]
    assert error[1] < 0.8 * error[0]


def few_matched(monkeypatch, count):
    counts = samples_module.amounts
    few = lambda subject: replace(counts(subject), matched=count, calibration=12)  # noqa: E731
    monkeypatch.setattr(sources_module, "amounts", few)


def test_factors_are_solved_on_matched_leaves_for_ranks_by_budget(tmp_path, monkeypatch):
    experiment, info = paper("fashion-mnist"), data.describe("fashion-mnist")
    few_matched(monkeypatch, 8)
    monkeypatch.setattr(matching, "STEPS", 2)
    torch.manual_seed(0)
    study = Study(experiment, info, None, experiment.build(), tmp_path, Config(**TINY))
    assert len(study.starts(3, "paper", "kegfast", 0)) == 1
    plain, solved = study.starts(3, "budget", "kegfast", 0)
    norms = [model.layers3[1].bn2.running_mean for model in (plain, solved)]
    assert not torch.equal(*norms)


def test_leaves_are_matched_once_for_a_teacher_with_statistics(tmp_path, monkeypatch):
    experiment, info = paper("fashion-mnist"), data.describe("fashion-mnist")
    few_matched(monkeypatch, 20)
    seen = []

    def match(model, samples):  # a part of them, as the real one
        seen.append(len(samples))
        return samples[:12] + 1

    monkeypatch.setattr(samples_module, "match_statistics", match)
    torch.manual_seed(0)
    study = Study(experiment, info, None, experiment.build(), tmp_path, Config(**TINY))
    made = study.sources(0).matched()
    assert seen == [20, 8]
    assert torch.equal(study.sources(0).calibration(), made[:12])
    pool, seconds = study.sources(0).pool("kegfast")
    assert seen == [20, 8]
    assert len(pool) == TINY["pool"]
    assert seconds > study.ledger.cells["matched/0"]["seconds"] > 0
    values = set(made.flatten().tolist())
    assert set(pool.samples.flatten().tolist()) <= values  # moved and mirrored, not changed
    assert not torch.equal(study.sources(1).matched(), made)


@pytest.mark.parametrize(("ranks", "stay"), [("paper", True), ("budget", False)])
def test_layers_that_a_student_shares_with_its_teacher_stay(ranks, stay, tmp_path):
    experiment, info = paper("fashion-mnist"), data.describe("fashion-mnist")
    torch.manual_seed(0)
    study = Study(experiment, info, None, experiment.build(), tmp_path, Config(**TINY))
    pool, _ = study.sources(0).pool("procedural")
    (start,) = study.starts(3, ranks, "procedural", 0)
    old = {name: p.detach().clone() for name, p in start.named_parameters()}
    (taught,) = study.teach("s3", start, study.lesson(pool, ranks, "procedural", 0))
    new = dict(taught.named_parameters())
    assert not torch.equal(old["linear.weight"], new["linear.weight"])
    for name, value in old.items():
        if name.split(".")[0] in experiment.shared:
            assert torch.equal(value, new[name]) == stay, name


def test_factors_of_a_table_are_solved_for_ranks_by_budget_alone(tmp_path):
    experiment, info = paper("pendigits"), data.describe("pendigits")
    torch.manual_seed(0)
    study = Study(experiment, info, None, experiment.build(), tmp_path, Config(**TINY))
    assert [len(study.starts(1, ranks, "kegfast", 0)) for ranks in ("paper", "budget")] == [1, 2]


def test_seconds_of_a_row_are_those_of_its_fastest_seed(table_paper, tmp_path):
    options = {"seeds": [0, 1], "methods": ["gaussian"], "ranks": ["paper"], **TINY}
    result = reproduce("pendigits", tmp_path, **options)
    cells = result.study.ledger.cells
    taken = [cells[cell_name(1, "paper", "gaussian", seed)]["seconds"] for seed in (0, 1)]
    assert 0 < result.rows[0]["seconds"] == min(taken)


def test_street_digits_stand_in_for_svhn_under_their_own_name(tmp_path):
    folder, draw = tmp_path / "data" / "street-digits", np.random.default_rng(0)
    folder.mkdir(parents=True)
    x, y = draw.integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 10
    np.savez(folder / "street_digits.npz", x=x, y=y)
    weights = tmp_path / "teacher.safetensors"
    save_tensors(weights, paper("svhn").build().state_dict())
    options = {"students": [1], "seeds": [0], "ranks": ["paper"], "methods": ["tucker-only", "oracle"]}
    result = reproduce("svhn", tmp_path / "run", root=folder.parent, teacher=weights, **options, **TINY)
    (row,) = result.rows  # there are no images to teach an oracle
    assert (row["tested"]["set"], row["tested"]["n"]) == ("street-digits", 40)
    assert row["accuracy"][0] % 2.5 == 0
    assert 0 <= row["tested"]["agreement"][0] <= 100
    assert "on 40 street-digits" in result.report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="teacher must be given"):
        reproduce("svhn", tmp_path / "other", root=folder.parent, **TINY)


def test_binomial_intervals_hold_as_often_as_they_say():
    for end in binomial_interval(80, 446):  # where 80 % is just not too far away
        assert abs(end / 100 - 0.8) == pytest.approx(1.96 * (end / 100 * (1 - end / 100) / 446) ** 0.5)
    draws = np.random.default_rng(0).binomial(446, 0.8, 2_000)
    ends = [binomial_interval(100 * k / 446, 446) for k in draws]
    assert 0.93 < np.mean([a <= 80 <= b for a, b in ends]) < 0.97
    assert binomial_interval(100, 20)[1] == 100
    assert binomial_interval(0, 20)[0] == 0
