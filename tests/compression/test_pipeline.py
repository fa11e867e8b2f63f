"""Surgery on any module, and the report of it."""

import copy
import io
import json
from functools import partial

import pytest
import torch
from odd import odd
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from kegfast import compress, densify, fuse
from kegfast._util.html import Page
from kegfast.compression import export_onnx, unfuse
from kegfast.compression.report import LayerReport
from kegfast.models import LeNet5, ResNet14
from kegfast.nn import TuckerConv2d, TuckerLinear

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def test_full_energy_changes_nothing_but_the_layers():
    model = odd()
    ranks = {
        "stem": (3, 16),
        "block.0.0": (16, 32),
        "shared": (32, 32),
        "pointwise": (32, None),
        "tiny": (48, 1),
        "fc": (48, 10),
        "unused": (None, 4),
    }
    student, report = compress(model, ranks)
    assert report.ranks == ranks
    torch.testing.assert_close(student(X), model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(student)(X), model(X), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, TuckerConv2d | TuckerLinear) for m in student.modules())


def test_the_original_stays_and_inplace_changes_it():
    model = odd()
    before = copy.deepcopy(model.state_dict())
    student, _ = compress(model, 0.5)
    assert student is not model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    same, report = compress(model, 0.5, inplace=True)
    assert same is model
    torch.testing.assert_close(same(X), student(X))
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_shared_layers_are_handled_once():
    student, report = compress(odd(), {"shared": (8, 8)})
    assert student.shared is student.alias
    assert report["alias"] is report["shared"]
    assert report["shared"].aliases == ["alias"]
    by_alias, _ = compress(odd(), {"alias": (8, 8)})
    assert isinstance(by_alias.shared, TuckerConv2d)


def test_factors_are_not_factorized_again():
    torch.manual_seed(0)
    once, first = compress(odd(), 0.5)
    twice, second = compress(once, 0.5)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert first.ranks
    assert not any(name.startswith(tuple(first.ranks)) for name in second.ranks)
    assert "densify first" in {entry.reason.partition("kegfast.")[2][:13] for entry in second.layers}


def test_reasons_of_layers_that_stay():
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "pruned": prune.l1_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5),
            "normed": parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "hooked": nn.Conv2d(8, 8, 3),
            "tied": nn.Linear(8, 8),
            "tied_too": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "lazy": nn.LazyConv2d(8, 3),
            "fine": nn.Conv2d(8, 8, 3),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["tied_too"].weight = model["tied"].weight
    student, report = compress(model, 0.25)
    reasons = {
        "grouped": "grouped",
        "depthwise": "depthwise",
        "pruned": "pruned",
        "normed": "parametrized",
        "transposed": "ConvTranspose2d",
        "hooked": "hooks",
        "tied": "tied_too",
        "attention.out_proj": "MultiheadAttention",
        "lazy": "initialized",
    }
    for name, words in reasons.items():
        assert words in report[name].reason, name
        assert report[name].decision == "dense"
        assert type(student.get_submodule(name)) is type(model.get_submodule(name))
    assert report["fine"].decision == "tucker"


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("kernel", [3, (1, 3), (2, 3), 1])
def test_every_padding(padding, mode, kernel):
    torch.manual_seed(0)
    model = nn.Conv2d(6, 8, kernel, padding=padding, padding_mode=mode)
    x = torch.randn(2, 6, 9, 7)
    for rank in ((6, 8), (6, None), (None, 8)):
        student, _ = compress(model, {"": rank})
        torch.testing.assert_close(student(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(densify(student)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("rank", [(6, 8), (6, None), (None, 8)])
def test_strided_pointwise(stride, rank):
    model = nn.Conv2d(6, 8, 1, stride=stride, bias=False)
    x = torch.randn(2, 6, 9, 7)
    student, _ = compress(model, {"": rank})
    torch.testing.assert_close(student(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(student)(x), model(x), rtol=1e-4, atol=1e-5)


def test_mode_dtype_and_frozen_weights_are_kept():
    model = ResNet14().to(torch.bfloat16).train()
    model.layers3.requires_grad_(False)
    student, _ = compress(model, 0.5, include="layers*")
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == (not name.startswith("layers3"))
    assert all(module.training for module in student.modules())


def test_include_exclude_and_mappings_choose():
    model = ResNet14()
    _, report = compress(model, 0.25, include=["layers3.*", "layers2.0.*"], exclude="*.conv2")
    assert set(report.ranks) == {"layers2.0.conv1", "layers3.0.conv1", "layers3.1.conv1"}
    assert report["layers3.0.conv2"].reason == "in exclude"
    assert report["conv1"].reason == "not in include"


def test_layers_that_would_grow_stay():
    _, report = compress(LeNet5(), 1.0)
    assert report.ranks == {}
    assert report.ratio == 1.0
    assert "smaller" in report["conv1"].reason


def test_ranks_are_rounded_up_where_it_saves():
    _, report = compress(ResNet14(), {"layers3.*": (13, 17)}, round_to=8)
    assert report["layers3.1.conv1"].rank == (16, 24)
    assert report["layers3.1.conv1"].rank_before_rounding == (13, 17)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": "nothing*"}, "include must match a layer"),
        ({"exclude": ["nothing*"]}, "exclude must match a layer"),
        ({"rank": {"nothing": "evbmf"}}, "rank must match a layer"),
        ({"rank": {"conv1": (2, 6)}}, "rank of conv1: in_rank must be an int from 1 to 1"),
        ({"rank": "svd"}, "rank must be"),
        ({"rank": {"conv3": (16, 120)}, "budget": {"params": 0.2}}, r"budget\['params'\] must be at least"),
        ({"budget": {"size": 0.5}}, "budget must be"),
        ({"budget": {"params": 1.5}}, "a fraction in"),
        ({"budget": True}, "budget must be a positive int"),
        ({"budget": 0}, "budget must be a positive int"),
        ({"budget": 61_707}, "budget must be at most the model's 61706 parameters"),
        ({"budget": 100}, "at least .* parameters.* of whose 5 layers 5 can be factored"),
        ({"budget": {"params": 0.001}}, "must be at least"),
        ({"budget": {"flops": 0.5}}, "example_input must be given"),
        ({"round_to": 0}, "round_to must be"),
        ({"samples": 1}, "samples must be"),
        ({"example_input": 5}, "example_input must be a tensor, or a tuple or a dict of tensors"),
        ({"example_input": torch.ones(1, 3, 32, 32)}, "example_input must be what the model takes"),
        ({"example_input": torch.ones(0, 1, 32, 32)}, "example_input must be of finite values"),
        ({"example_input": torch.full((1, 1, 32, 32), torch.nan)}, "example_input must be of finite values"),
        ({"round_to": True}, "round_to must be"),
        ({"include": 3}, "include must be"),
        ({"exclude": 3}, "exclude must be"),
        ({"include": []}, "include must be"),
        ({"rank": {}}, "rank must be"),
        ({"rank": {3: "evbmf"}}, "rank must be"),
        ({"calibration": torch.ones(4, 1, 32, 32, dtype=torch.int64)}, "calibration must be"),
        ({"calibration": torch.ones(4, 3, 32, 32)}, "calibration must be what the model takes"),
        ({"calibration": 3}, "calibration must be"),
        ({"calibration": torch.full((4, 1, 32, 32), torch.nan)}, "calibration must be"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compress(LeNet5(), **kwargs)


@pytest.mark.parametrize("f", [fuse, densify, unfuse, partial(export_onnx, path="m", example_input=None)])
def test_a_number_is_no_module(f):
    with pytest.raises(TypeError, match="model must be"):
        f(5)


def test_no_module_and_no_finite_weight():
    with pytest.raises(TypeError, match="model must be"):
        compress({"conv": 1})
    with torch.device("meta"), pytest.raises(ValueError, match="model must hold"):
        compress(LeNet5())
    model = LeNet5()
    model.conv2.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"finite weights.*conv2"):
        compress(model)


def test_flops_are_those_that_torch_counts():
    model = odd()
    ranks = {"stem": (2, 4), "block.0.0": (5, 6), "shared": (8, None), "pointwise": (8, None), "fc": (4, 4)}
    student, report = compress(model, ranks, example_input=X, measure=False)
    for which, flops in ((model, report.flops_before), (student, report.flops)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            which(X)
        assert counter.get_total_flops() == flops


class Pyramid(nn.Module):
    """One head on images of two sizes, as detectors have it, and a Linear in a loop."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 16, 3, padding=1)
        self.step = nn.Linear(16, 16)

    def forward(self, x):  # (N, 8, H, W)
        x = self.head(x).mean((2, 3)) + self.head(x[:, :, ::2, ::2]).mean((2, 3))
        for _ in range(3):
            x = torch.relu(self.step(x))
        return x


@pytest.mark.parametrize("rank", [{"head": (4, 4), "step": (5, None)}, {"head": (None, 5), "step": (4, 4)}])
def test_flops_of_layers_that_run_several_times(rank):
    torch.manual_seed(0)
    model, x = Pyramid(), torch.randn(2, 8, 9, 7)
    student, report = compress(model, rank, example_input=x, measure=False)
    assert report["step"].flops_before == 3 * 2 * 2 * 16 * 16
    for which, flops in ((model, report.flops_before), (student, report.flops)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            which(x)
        assert counter.get_total_flops() == flops
    _, measured = compress(model, rank, example_input=x)
    assert measured["head"].latency["dense"] > 0


def test_the_report_in_every_form(tmp_path):
    _, report = compress(LeNet5(), 0.3, example_input=torch.zeros(1, 1, 32, 32), measure=False)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ratio"] == pytest.approx(report.ratio)
    assert {layer["name"] for layer in plain["layers"]} == {"conv1", "conv2", "conv3", "fc1", "fc2"}
    lines = report.to_markdown().splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert f"{report.parameters:,} parameters" in report.to_markdown()
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert "conv3" in console.file.getvalue()
    page = Page("report")
    report.add_to(page)
    page.write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 3  # parameters, FLOPs, errors
    assert text.count("</tr>") == 1 + 5
    assert f"{report.parameters:,} parameters" in text.replace("&gt;", ">")
    with pytest.raises(KeyError):
        report["conv9"]
    assert LayerReport("a", "Conv2d", (1,)).decision == "dense"
