"""Budgets: the allocation against brute force, the error tables against real decompositions."""

from itertools import product

import numpy as np
import pytest
import torch
from odd import odd
from torch import nn

from kegfast import compress, data
from kegfast.compression.budget import allocate, tabulate
from kegfast.compression.costs import parameters
from kegfast.decomposition.decompose import factorize, relative_error
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
