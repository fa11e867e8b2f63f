"""Never slower: the fastest way is kept, and what loses is rolled back."""

from functools import partial

import pytest
import torch
from torch import nn

from kegfast import compress
from kegfast.nn import TuckerConv2d


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()


def pretend(monkeypatch, costs):
    """Replaces the clock: a call takes what `costs` says about it."""

    def take_turns(calls, rounds=5, *, seconds, seed=0):
        return {name: [costs(name, call)] for name, call in calls.items()}

    monkeypatch.setattr("kegfast._util.timing.take_turns", take_turns)


X = torch.zeros(1, 16, 8, 8)


@pytest.mark.parametrize("fastest", ["dense", "unfused", "fused"])
def test_the_fastest_way_is_kept(monkeypatch, model, fastest):
    pretend(monkeypatch, lambda name, _: 1.0 if name in (fastest, "after") else 2.0)
    student, report = compress(model, 0.25, example_input=X)
    kinds = {"dense": nn.Conv2d, "unfused": nn.Sequential, "fused": TuckerConv2d}
    assert isinstance(student[0], kinds[fastest])
    assert report["0"].decision == {"dense": "dense", "unfused": "factors", "fused": "tucker"}[fastest]
    assert report["0"].latency.keys() == {"dense", "unfused", "fused"}
    if fastest == "dense":
        assert "slower" in report["0"].reason
        assert report.ratio == 1.0


def test_identical_layers_are_timed_once(monkeypatch):
    timed = []

    def take_turns(calls, rounds=5, *, seconds, seed=0):
        timed.append(set(calls))
        return {name: [0.5 if name in ("fused", "after") else 1.0] for name in calls}

    monkeypatch.setattr("kegfast._util.timing.take_turns", take_turns)
    convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)] + [
        nn.Conv2d(16, 16, 3, padding=2, dilation=2)
    ]
    _, report = compress(nn.Sequential(*convs).eval(), {"*": (4, 4), "2": (4, 5)}, example_input=X)
    assert sum("dense" in calls for calls in timed) == 3  # other ranks and another dilation are other layers
    assert all(layer.latency == {"dense": 1.0, "unfused": 1.0, "fused": 0.5} for layer in report.layers)


def test_as_many_layers_are_restored_as_their_times_ask_for(monkeypatch):
    """The whole model is timed once more, not once for each of eight layers that lose."""
    runs = []

    def take_turns(calls, rounds=5, *, seconds, seed=0):
        if "after" not in calls:
            slow = calls["fused"].args[0].last.out_channels == 16
            return {"dense": [1.0], "unfused": [3.0], "fused": [1.1 if slow else 0.5]}
        student = calls["after"].__closure__[1].cell_contents
        layers = [m for m in student if isinstance(m, TuckerConv2d)]
        runs.append(len(layers))
        losses = [0.1 if m.last.out_channels == 16 else -0.5 for m in layers]
        return {"before": [9.0], "after": [9.0 + sum(losses)]}

    monkeypatch.setattr("kegfast._util.timing.take_turns", take_turns)
    convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)] + [nn.Conv2d(16, 24, 3, padding=1)]
    _, report = compress(nn.Sequential(*convs).eval(), {"*": (4, 4)}, example_input=X)
    assert runs == [9, 5]
    assert len(report.ranks) == 5


def test_layers_are_rolled_back_until_the_model_is_not_slower(monkeypatch, model):
    """Explicit ranks and budgets keep a slower layer unless the whole model is slower."""

    def module_of(call):
        if isinstance(call, partial):
            return call.args[0]
        return next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, nn.Module))

    def costs(name, call):
        if name == "before":
            return 1.0
        module = module_of(call)
        if name == "after":
            return 0.98 if isinstance(module[2], nn.Conv2d) else 1.01
        if name == "fused":  # both lose, the second one more
            return 1.1 if module.first.in_channels == 16 else 1.2
        return {"dense": 1.0, "unfused": 3.0}[name]

    pretend(monkeypatch, costs)
    student, report = compress(model, {"*": (4, 4)}, example_input=X)
    assert isinstance(student[0], TuckerConv2d)
    assert type(student[2]) is nn.Conv2d
    assert "restored" in report["2"].reason
    assert report["2"].rank is None
    assert report["2"].parameters == report["2"].parameters_before
    assert report.parameters == sum(p.numel() for p in student.parameters())
    assert report.latency["after"] <= report.latency["before"]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ([1.0] * 9, [0.98] * 9, True),
        ([1.0] * 9, [0.995] * 9, False),  # within the margin: another run may say otherwise
        ([1.0] * 9, [1.0] * 9, False),
        ([1.0] * 9, [0.9] * 5 + [1.1] * 4, False),  # the median wins, by luck
        ([1.0] * 30, [0.9] * 24 + [1.1] * 6, True),
        ([1.0, 2.0, 3.0] * 5, [0.9, 1.8, 2.7] * 5, True),  # both slowed down alike
    ],
)
def test_only_what_is_surely_faster_is_kept(monkeypatch, model, before, after, kept):
    def take_turns(calls, rounds=5, *, seconds, seed=0):
        return {name: {"before": before, "after": after}.get(name, [0.5]) for name in calls}

    monkeypatch.setattr("kegfast._util.timing.take_turns", take_turns)
    student, report = compress(model, {"*": (4, 4)}, example_input=X)
    assert bool(report.ranks) == kept
    assert report.latency["after"] <= report.latency["before"]
    if not kept:
        assert any("dense again" in note for note in report.notes)
        torch.testing.assert_close(student(X), model(X), rtol=0, atol=0)


def test_a_real_measurement_is_never_slower():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.randn(2, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    _, report = compress(model, 0.25, example_input=x)
    assert report.latency["after"] <= report.latency["before"] or report.ratio == 1.0
