"""The ways to share a budget out: every one keeps it, the least change wins."""

import pytest
import torch
from odd import odd
from torch import Tensor, nn

from kegfast import compress
from kegfast.compression.allocation import USUAL, choose
from kegfast.compression.evidence import Evidence, Samples
from kegfast.models import LeNet5

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
    x = torch.randn(2, 3, 16, 16)
    for kind in ("params", "flops"):
        for wanted in PLANS:

            def take(found, *args, wanted=wanted):
                assert found.keys() == PLANS
                return wanted, choose(found, *args)[1]

            monkeypatch.setattr("kegfast.compression.planning.choose", take)
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
    way, changes = choose(found, teacher, trial, Evidence(samples=Samples(torch.randn(10, 4))))
    assert way == "near"
    assert changes["near"] < changes["far"] == changes["same"]
    assert choose(found, teacher, trial, Evidence()) == ("far", {})


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
    evidence = Evidence(samples=Samples(inputs, synthetic=synthetic))
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
    evidence = Evidence(samples=Samples(inputs))
    trial = {plan[""]: students[way] for way, plan in plans.items()}
    way, changes = choose(plans, Fixed(inputs), lambda plan: trial[plan[""]], evidence)
    assert way == "answers"
    assert changes["squares"] > 0.5 > changes["answers"]
