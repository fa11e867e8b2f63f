"""Budgets: the allocation against brute force, the error tables against real decompositions, calibration."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from odd import odd
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kegfast import compress, data
from kegfast.compression.allocation import USUAL, choose
from kegfast.compression.budget import allocate, tabulate
from kegfast.compression.costs import parameters
from kegfast.compression.decompose import Metric, factorize, relative_error
from kegfast.compression.evidence import Evidence
from kegfast.compression.matching import match_statistics
from kegfast.compression.norms import batch_statistics, look_familiar, reestimate_norms
from kegfast.compression.refit import refit
from kegfast.compression.samples import balanced, gather, of_every_class, probes
from kegfast.distillation import GaussianNoise, Mixture
from kegfast.models import LeNet5, ResNet14


def table(shape, seed=0, **kwargs):
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64) * torch.logspace(0, -2, shape[0])[:, None, None, None]
    return weight, tabulate(weight, parameters(shape), weight.numel(), **kwargs)


def test_errors_bound_those_of_the_decomposition():
    """HOOI starts from the HOSVD, so it is at most as bad; on one side both are the SVD."""
    weight, options = table((10, 8, 3, 3))
    norm = float(weight.square().sum())
    for index in range(0, len(options.costs) - 1, 7):
        option = options.option(index)
        found = relative_error(weight, factorize(weight, option.rank)) ** 2 * norm
        assert found <= option.error * (1 + 1e-9)
        assert found == pytest.approx(option.error, rel=0.15 if None not in option.rank else 1e-8)
        assert option.cost < weight.numel()


def test_the_allocation_is_within_a_step_of_the_best():
    tables = {name: table((5, 4, 3, 3), seed)[1] for seed, name in enumerate("abc")}
    least = sum(t.costs.min() for t in tables.values())
    most = sum(t.costs[-1] for t in tables.values())
    for budget in np.linspace(least, most, 9):
        chosen = allocate(tables, budget)
        assert sum(option.cost for option in chosen.values()) <= budget + 1e-9
        error = sum(option.error for option in chosen.values())
        best = (
            min(
                sum(t.errors[i] for t, i in zip(tables.values(), indices, strict=True))
                for indices in product(*(range(len(t.costs)) for t in tables.values()))
                if sum(t.costs[i] for t, i in zip(tables.values(), indices, strict=True)) <= budget
            )
            if budget < 150
            else None
        )
        if best is not None:
            assert error <= best + max(t.errors.max() for t in tables.values()) * 0.15
    assert all(option.rank is None for option in allocate(tables, most).values())
    with pytest.raises(ValueError, match="at least"):
        allocate(tables, least - 1)


def test_more_budget_never_means_more_error():
    tables = {name: table((12, 10, 3, 3), seed)[1] for seed, name in enumerate("ab")}
    budgets = np.linspace(200, 2000, 30)
    errors = [sum(option.error for option in allocate(tables, b).values()) for b in budgets]
    hull = [min(errors[: i + 1]) for i in range(len(errors))]
    assert errors[-1] < 0.05 * errors[0]
    assert all(error <= best * 1.1 + 1e-12 for error, best in zip(errors, hull, strict=True))


def test_steps_restrict_the_ranks():
    _, options = table((12, 10, 3, 3), step=4)
    assert set(options.ranks[:, 0]) <= {0, 4, 8, 10}
    assert set(options.ranks[:, 1]) <= {0, 4, 8, 12}


@pytest.mark.parametrize(("kind", "fraction"), [("params", 0.6), ("flops", 0.6), ("memory", 0.8)])
def test_budgets_are_kept(kind, fraction):
    x = torch.randn(2, 3, 16, 16)
    model = odd()
    student, report = compress(model, budget={kind: fraction}, example_input=x, measure=False)
    assert report.ranks
    assert student(x).isfinite().all()
    if kind == "params":
        assert 0.55 < report.parameters / report.parameters_before <= 0.6
    if kind == "flops":
        assert 0.55 < report.flops / report.flops_before <= 0.6


def test_a_number_of_parameters_is_a_budget():
    _, report = compress(LeNet5(), budget=20_000)
    assert 19_500 < report.parameters <= 20_000


def test_a_mapping_settles_layers_and_the_budget_pays_for_the_rest():
    model = odd()
    rules = {"shared": (8, 8), "stem": "evbmf"}
    student, report = compress(model, rules, budget={"params": 0.5})
    free, alone = compress(model, budget={"params": 0.5}), compress(model, rules)[1]
    assert report["shared"].rank == (8, 8) != free[1]["shared"].rank
    assert report["stem"].rank == alone["stem"].rank
    assert "explicit" in report["shared"].reason
    assert 0.45 < report.parameters / report.parameters_before <= 0.5
    assert set(report.ranks) > {"shared", "stem"}
    assert "relative error" in report["fc"].reason
    assert student(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("rule", [0.5, "energy=0.9", "evbmf", (6, 9)])
def test_a_rule_limits_the_ranks_that_a_budget_may_give(rule):
    model = ResNet14()
    _, ruled = compress(model, rule)
    _, report = compress(model, rule, budget={"params": 0.6})
    assert report.parameters <= min(0.6 * report.parameters_before, ruled.parameters)
    assert report.ranks
    for name, rank in report.ranks.items():
        for side, limit in zip(rank, ruled.ranks[name], strict=True):
            assert side <= limit if side and limit else name == "linear"


PLANS = {
    "sensitivity",
    "half relative sensitivity",
    "mostly relative sensitivity",
    "relative sensitivity",
    "error",
    "relative error",
    "ratio",
    "energy",
}


def test_no_other_plan_would_have_changed_the_outputs_less():
    """The plan taken is the best of all by measurement of its own student, not by prediction."""
    torch.manual_seed(0)
    model, samples = LeNet5().eval(), torch.randn(64, 1, 32, 32)
    student, report = compress(model, budget={"params": 0.3}, calibration=samples)
    assert report.plans.keys() == PLANS
    best = min(report.plans.values())
    taken = next(way for way, change in report.plans.items() if change == best)
    assert f"({taken}, on the inputs)" in report["conv3"].reason
    with torch.no_grad():
        wanted = model(samples)
        change = (student(samples) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert change <= best * 1.05  # the least squares after it make it better


def test_every_plan_keeps_the_budget(monkeypatch):
    from kegfast.compression import compress as function

    module = __import__("sys").modules[function.__module__]
    x = torch.randn(2, 3, 16, 16)
    for kind in ("params", "flops"):
        for wanted in PLANS:

            def take(found, *args, wanted=wanted):
                assert found.keys() == PLANS
                return wanted, choose(found, *args)[1]

            monkeypatch.setattr(module, "choose", take)
            _, report = compress(odd(), budget={kind: 0.6}, example_input=x, measure=False)
            after, before = (report.parameters, report.parameters_before)
            if kind == "flops":
                after, before = report.flops, report.flops_before
            assert 0.3 * before < after <= 0.6 * before, wanted


def test_the_plan_with_the_least_change_is_taken():

    teacher = nn.Linear(4, 3)

    def trial(plan):
        student = nn.Linear(4, 3)
        student.load_state_dict({name: value + plan["off"] for name, value in teacher.state_dict().items()})
        return student

    found = {"far": {"off": 0.5}, "near": {"off": -0.1}, "same": {"off": 0.5}}
    way, changes = choose(found, teacher, trial, Evidence(samples=torch.randn(10, 4)))
    assert way == "near"
    assert changes["near"] < changes["far"] == changes["same"]
    assert choose(found, teacher, trial, Evidence()) == ("far", {})


def test_a_budget_of_latency_follows_the_clock(monkeypatch):
    """The clock is pretended: the second convolution gains nothing from being factored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))

    def clock(calls, *, seconds):
        gains = {"1/2": 0.6, "1/4": 0.4, "1/8": 0.3, "1/16": 0.25}
        first = calls["dense"].args[0].out_channels == 32
        return {name: gains.get(name, 1.0) if first or name == "dense" else 1.1 for name in calls}

    monkeypatch.setattr("kegfast.compression.costs.interleaved", clock)
    x = torch.randn(1, 32, 8, 8)
    _, report = compress(model.eval(), budget={"latency": 0.75}, example_input=x, measure=False)
    assert set(report.ranks) == {"0"}
    in_rank, out_rank = report.ranks["0"]
    assert 4 <= in_rank <= 16 or 4 <= out_rank <= 16


def test_probes_are_the_same_every_time_and_normal():
    for shape in ((1, 32, 32), (3, 20, 24), (9,), (2, 3, 3)):
        first = probes(shape)
        assert torch.equal(first, probes(shape))
        assert first.shape[1:] == shape
        assert float(first.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", ["tensor", "dataset", "loader", "source"])
def test_calibration_takes_any_source(form):
    samples = torch.randn(40, 1, 32, 32)

    class Source:
        def sample(self, n):
            return samples[:n], None

    forms = {
        "tensor": samples,
        "dataset": TensorDataset(samples, torch.zeros(40)),
        "loader": DataLoader(samples, batch_size=7),
        "source": Source(),
    }
    teacher = LeNet5()
    _, report = compress(teacher, budget={"params": 0.4}, calibration=forms[form], samples=32)
    assert report.parameters <= 0.4 * report.parameters_before
    assert any("32 inputs" in note for note in report.notes)


class Sign(nn.Module):
    """Three classes by one number: below 0, above 1, and in between."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], 0.5 - (x[:, 0] - 0.5).abs(), x[:, 0] - 1], 1)


def test_sources_give_every_class_alike() -> None:
    class Skewed:
        def sample(self, n: int) -> tuple[Tensor, None]:
            return torch.randn(n, 4, generator=rng) - 0.5, None

    rng = torch.Generator().manual_seed(0)
    first = gather(Skewed(), 60, Sign())
    samples = of_every_class(Sign(), first, Skewed())
    assert samples.shape == (60, 4)
    assert Sign()(samples[:9]).argmax(1).bincount(minlength=3).tolist() == [3, 3, 3]  # so is every prefix
    assert Sign()(samples).argmax(1).bincount().tolist() == [20, 20, 20]  # of the first 60 few are above 1
    assert Sign()(first).argmax(1).bincount(minlength=3).tolist()[2] < 10
    mixture = Mixture([Skewed(), GaussianNoise((4,))], weights=[1, 3])
    mixed = of_every_class(Sign(), gather(mixture, 60, Sign()), mixture)
    assert mixed.shape == (60, 4)
    for part in (mixed[:9], mixed[15:24]):  # every source by itself
        assert Sign()(part).argmax(1).bincount(minlength=3).tolist() == [3, 3, 3]
    given = torch.randn(70, 4)
    assert of_every_class(Sign(), given, given) is given  # what the caller chose stays as it is
    flat = nn.Flatten(0)  # no table of logits
    assert torch.equal(balanced(flat, given, 8), given[:8])


def test_refitting_brings_outputs_closer():

    torch.manual_seed(0)
    teacher = odd()
    samples = torch.randn(64, 3, 16, 16)
    reestimate_norms(teacher, samples)
    student, _ = compress(teacher, {"stem": (2, 8), "block.0.0": (8, 12), "fc": (8, None)})
    with torch.no_grad():
        before = (student(samples) - teacher(samples)).square().mean()
        refit(student, teacher, samples)
        after = (student(samples) - teacher(samples)).square().mean()
    assert after < 0.7 * before


def best_product(weight, gram, output, rank):
    """Of all products of a rank the one whose outputs cost least, by two SVDs that say so."""
    left, right = torch.linalg.cholesky(output), torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(left.T @ weight @ right)
    return torch.linalg.solve(left.T, u[:, :rank] * s[:rank]) @ torch.linalg.solve(right.T, v[:rank].T).T


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_two_factors_are_solved_at_once_in_the_outputs_metric(rank: int) -> None:
    """Without a pull, the regression onto the dense layer's outputs is that layer's best approximation."""
    torch.manual_seed(rank)
    teacher = nn.Sequential(nn.Linear(12, 9, bias=False)).double()
    samples = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    mixing = torch.randn(9, 9, dtype=torch.float64)
    metric = Metric(torch.eye(12), mixing @ mixing.T)
    student, _ = compress(teacher, {"0": (rank, None)})
    refit(student, teacher, samples, {"0": metric}, ridge=(0.0, 0.0))
    wanted = best_product(teacher[0].weight.detach(), samples.T @ samples, metric.output, rank)
    found = student[0].core.weight @ student[0].first.weight
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


GEOMETRIES = {
    "strided": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "same": {"padding": "same"},
    "uneven same": {"padding": "same", "kernel_size": (4, 3)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "valid": {"padding": "valid"},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rank", [(5, 4), (None, 4), (5, None)])
def test_refitting_reads_every_geometry(name: str, rank: tuple[int | None, int | None]) -> None:
    """With full ranks' worth of room on both sides the dense layer comes back from spoilt factors."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, **GEOMETRIES[name]}
    conv = nn.Conv2d(6, 8, **options).double()
    with torch.no_grad():  # its ranks are those asked for
        basis, out = torch.randn(rank[0] or 6, 6).double(), torch.randn(8, rank[1] or 8).double()
        inner = torch.randn(out.shape[1], len(basis), *conv.kernel_size).double()
        conv.weight.copy_(torch.einsum("ko,oihw,ic->kchw", out, inner, basis))
    teacher = nn.Sequential(conv)
    samples = torch.randn(20, 6, 9, 8, dtype=torch.float64)
    pointwise = name == "pointwise"
    if pointwise and None not in rank:
        rank = (4, None)
    student, _ = compress(teacher, {"0": rank})
    metric = Metric(torch.eye(6), torch.eye(8))
    with torch.no_grad():
        for part in list(student[0].children())[0 if pointwise else -1 if rank[1] is None else -2 :]:
            part.weight.add_(torch.randn_like(part.weight))
        wanted = teacher(samples)
        refit(student, teacher, samples, {"0": metric}, ridge=(1e-9, 1e-9))
        torch.testing.assert_close(student(samples), wanted, rtol=1e-4, atol=1e-4)


def test_teacher_is_untouched_by_calibration():
    teacher = ResNet14().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    compress(teacher, budget={"params": 0.5}, calibration=torch.randn(16, 1, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert modes == [module.training for module in teacher.modules()]
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@torch.inference_mode()
def accuracy(model, samples, labels):
    return 100 * float((model(samples).argmax(1) == labels).float().mean())


def test_budgets_beat_the_numbers_they_were_given(teachers, data_root):
    """MNIST at 4.55x and 5.74x, Fashion at 2.90x and 4.00x, on fewer images than the table's."""
    floors = {"mnist": ({4.55: 95.3, 5.74: 95.4}, "mnist"), "fashion": ({4.0: 79.9}, "fashion-mnist")}
    for name, (rows, source) in floors.items():
        splits = data.load(source, data_root)
        samples, labels = (t[:1000] for t in splits.test.tensors)
        calibration = splits.train.tensors[0][:256]
        for ratio, floor in rows.items():
            student, report = compress(teachers[name], budget={"params": 1 / ratio}, calibration=calibration)
            assert report.ratio >= ratio
            assert accuracy(student.eval(), samples, labels) >= floor


def test_made_samples_become_familiar_and_the_model_stays():
    teacher, start = odd(), 6 * torch.rand(32, 3, 16, 16) - 3
    scale = torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    reestimate_norms(teacher, 1 + scale * torch.randn(256, 3, 16, 16))
    before = copy.deepcopy(teacher.state_dict())
    assert not look_familiar(teacher, start)
    moved = match_statistics(teacher, start)
    assert moved.shape == start.shape
    assert float(moved.min()) >= float(start.min())
    assert float(moved.max()) <= float(start.max())

    def distance(samples):
        with batch_statistics(teacher) as seen, torch.no_grad():
            teacher(samples)
        norms = [(teacher.get_submodule(name), mean) for name, (mean, _) in seen.items()]
        return sum(float(((mean - n.running_mean).square() / n.running_var).mean()) for n, mean in norms)

    assert distance(moved) < 0.3 * distance(start)
    assert torch.equal(moved, match_statistics(teacher, start))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_plans_are_compared_as_the_students_will_be_refitted() -> None:
    """Refitting may turn the order of plans round; the student must be the best of those that come out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12)
    ).eval()
    inputs = torch.randn(256, 16) @ torch.randn(16, 16)
    student, report = compress(model, budget={"params": 0.4}, calibration=inputs, samples=256)
    with torch.no_grad():
        wanted, found = model(inputs), student(inputs)
    change = float((wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())
    change += float((wanted.argmax(1) != found.argmax(1)).float().mean())
    assert change == pytest.approx(min(report.plans.values()), rel=1e-3)


@pytest.mark.parametrize(("error", "taken"), [(0.105, USUAL), (0.12, "sensitivity")])
@pytest.mark.parametrize("synthetic", [True, False])
def test_made_samples_judge_roughly(synthetic: bool, error: float, taken: str) -> None:
    """A plan that is better on them by less than they can tell does not win."""
    inputs = torch.randn(64, 4, 3)  # no table of answers: squared errors alone
    students = {"sensitivity": nn.Identity(), USUAL: nn.Identity()}
    for student, size in zip(students.values(), (0.1, error), strict=True):
        student.register_forward_hook(lambda m, args, out, size=size: (1 + size**0.5) * out)
    plans = {way: {"": (rank, None)} for rank, way in enumerate(students, start=1)}
    trial = {plan[""]: students[way] for way, plan in plans.items()}
    evidence = Evidence(samples=inputs, synthetic=synthetic)
    way, changes = choose(plans, nn.Identity(), lambda plan: trial[plan[""]], evidence)
    assert way == (taken if synthetic else "sensitivity")
    assert min(changes, key=changes.get) == "sensitivity"


def test_a_classifiers_answers_count_beside_its_outputs() -> None:
    """Of two plans the one that keeps the answers wins, though the other's squared error is less."""
    inputs = torch.stack([torch.linspace(-9, 9, 8), torch.full((8,), 0.5), torch.zeros(8)], 1)
    near = inputs * torch.tensor([1.0, 0.0, 1.0]) + torch.tensor([0.0, 0.0, 0.1])

    class Fixed(nn.Module):
        def __init__(self, output: Tensor) -> None:
            super().__init__()
            self.output = output

        def forward(self, x: Tensor) -> Tensor:
            return self.output

    students = {"squares": Fixed(near), "answers": Fixed(0.9 * inputs)}
    plans = {way: {"": (rank, None)} for rank, way in enumerate(students, start=1)}
    evidence = Evidence(samples=inputs)
    trial = {plan[""]: students[way] for way, plan in plans.items()}
    way, changes = choose(plans, Fixed(inputs), lambda plan: trial[plan[""]], evidence)
    assert way == "answers"
    assert changes["squares"] > 0.5 > changes["answers"]
