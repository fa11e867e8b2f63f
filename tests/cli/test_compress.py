"""compress from the command line: rules beside a budget, the files it leaves, models of one's own."""

import json
import sys

import pytest
import torch
from cli_support import run

from kegfast import load
from kegfast.cli.compress import parse_ranks


@pytest.mark.parametrize(
    ("rules", "rank"),
    [
        (["evbmf"], "evbmf"),
        (["energy=0.9"], "energy=0.9"),
        (["0.5"], 0.5),
        (["8,11"], (8, 11)),
        (["-,4"], (None, 4)),
        (["a.*=8,11", "b=0.5", "c=energy=0.9"], {"a.*": (8, 11), "b": 0.5, "c": "energy=0.9"}),
    ],
)
def test_rank_rules(rules, rank):
    assert parse_ranks(rules) == rank


NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.split = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
    def forward(self, x):
        return torch.relu(self.norm(self.wide(x)) + self.split(x))

class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2, padding_mode="circular")
        self.stages = nn.ModuleDict({"low": nn.Sequential(Block(24), Block(24)), "high": Block(24)})
        self.gate = nn.Conv2d(24, 24, 1)
        self.tiny = nn.Conv2d(24, 1, 1)
    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.stages["high"](self.stages["low"](x))
        x = x * torch.sigmoid(self.gate(torch.relu(self.gate(x))))
        return self.tiny(x), x.mean((2, 3))

def backbone():
    torch.manual_seed(0)
    return Backbone()
"""


@pytest.fixture
def network(home):
    (home / "mine.py").write_text(NETWORK)
    sys.path.insert(0, str(home))
    import mine

    torch.save(mine.backbone().state_dict(), "net.pt")
    yield mine.backbone
    sys.path.remove(str(home))
    sys.modules.pop("mine")


COMMAND = "compress --model mine:backbone --weights net.pt --example 2,3,16,16 -o out/student.safetensors"


def layers(home):
    return {layer["name"]: layer for layer in json.loads((home / "out/student.json").read_text())["layers"]}


def test_a_model_of_ones_own_by_budget_beside_rules(home, network, capsys):
    """Nested, grouped, dilated, shared and tiny layers, two outputs; settled ranks and a budget at once."""
    assert run(f"{COMMAND} --rank stem=2,9 --budget params=0.6") == 0
    assert "student in out/student.safetensors" in capsys.readouterr().out
    found = layers(home)
    assert "grouped" in found["stages.high.split"]["reason"]
    assert found["gate"]["flops_before"] == 2 * 2 * (2 * 24 * 24 * 8 * 8)  # it runs twice, batch 2
    # Layers may be dense again where this machine measured that they are slower.
    assert found["stem"]["rank_before_rounding"] == [2, 9]
    assert found["stem"]["rank"] in (None, [2, 9])
    assert {path.suffix for path in (home / "out").iterdir()} == {".safetensors", ".json", ".html"}
    assert "<svg" in (home / "out/student.html").read_text()
    x = torch.randn(2, 3, 16, 16)
    without_code = load(home / "out/student.safetensors")
    with_code = load(home / "out/student.safetensors", network())
    program = torch.export.export(with_code, (x,)).module()
    for by_name, by_code, exported in zip(without_code(x), with_code(x), program(x), strict=True):
        torch.testing.assert_close(by_name, by_code)
        torch.testing.assert_close(exported, by_code)


def test_a_rule_is_the_limit_of_a_budget(home, network):
    assert run(f"{COMMAND} --rank 0.5") == 0
    limits = {name: layer["rank_before_rounding"] for name, layer in layers(home).items()}
    assert run(f"{COMMAND} --rank 0.5 --budget flops=0.7") == 0
    found = {name: layer["rank_before_rounding"] for name, layer in layers(home).items()}
    assert any(found.values())
    for name, rank in found.items():
        assert rank is None or all(
            side <= most for side, most in zip(rank, limits[name], strict=True) if side
        )
