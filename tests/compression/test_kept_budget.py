"""A size that was asked for is kept, whatever it costs in time; what it costs is said."""

import pytest
import torch
from torch import nn

from kegfast import compress
from kegfast.cli import main
from kegfast.compression import choice


@pytest.fixture
def slow_students(monkeypatch):
    """Every factored layer loses against the dense one, and every student against its model."""
    monkeypatch.setattr(choice.timing, "interleaved", lambda calls, *rest, **options: _slower(calls, 1.0))
    monkeypatch.setattr(
        choice.timing,
        "take_turns",
        lambda calls, *rest, **options: {name: [t] * 9 for name, t in _slower(calls, 2.0).items()},
    )


def _slower(calls, step):
    return {name: 1.0 + step * place for place, name in enumerate(calls)}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()


@pytest.mark.parametrize("kind", ["params", "flops", "memory"])
def test_timing_does_not_undo_a_budget_of_size(kind, slow_students):
    student, report = compress(model(), budget={kind: 0.6}, example_input=torch.randn(1, 8, 9, 9))
    assert report.ranks
    assert report.ratio > 1.2
    assert sum(p.numel() for p in student.parameters()) == report.parameters
    assert report.latency == {"before": 1.0, "after": 3.0}
    assert any("the budget is kept although a call takes 3.00 times as long" in note for note in report.notes)
    assert "3.00 times as long" in report.to_markdown()


@pytest.mark.parametrize("options", [{"rank": {"*": (3, 4)}}, {"rank": 0.4}])
def test_timing_undoes_what_no_budget_asked_for(options, slow_students):
    _, report = compress(model(), **options, example_input=torch.randn(1, 8, 9, 9))
    assert not report.ranks
    assert report.ratio == 1


def test_the_command_line_keeps_it_too(slow_students, tmp_path, capsys):
    torch.save(model().state_dict(), tmp_path / "weights.pt")
    layers = "nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)"
    (tmp_path / "slow_net.py").write_text(f"from torch import nn\nnet = lambda: nn.Sequential({layers})\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = (
            "--model slow_net:net --weights weights.pt --budget params=0.5 --example 1,8,9,9 -o s.safetensors"
        )
        assert main(["compress", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    assert "3.00 times as long" in printed
    assert "(1.00x)" not in printed
