"""kegfast.autotune on the CPU: what it measures, what later calls run, what it keeps in the user's cache."""

import json

import pytest
import torch
from torch import nn

import kegfast
from kegfast import choices, cpu
from kegfast.nn import TuckerConv2d

pytestmark = pytest.mark.skipif(not kegfast.build_info()["native"], reason="needs the compiled part")


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    """An empty cache folder, and no choice that outlives the test."""
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_table", None)
    yield
    for shape in cpu.table():
        cpu._choose(shape, "convolutions", for_good=False)
    monkeypatch.setattr(cpu, "_unfused", set())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = TuckerConv2d(48, 64, 3, (32, 32), padding=1), TuckerConv2d(64, 16, 3, (8, 8), stride=2)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


def choose(model: nn.Module, x: torch.Tensor, form: cpu.Form) -> None:
    """As if `form` had been measured to be the fastest everywhere."""
    for layer, z in cpu.layer_calls(model, x):
        geometry = layer.core.stride, layer.core.padding, layer.core.dilation
        shape = cpu.shape_of(z, layer.core.weight, layer.last.out_channels, geometry)
        cpu.table()[shape] = form
        cpu._choose(shape, form)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_form_is_measured_and_right(layout) -> None:
    model, x = network(), torch.randn(2, 48, 12, 10).contiguous(memory_format=layout)
    want = nn.Sequential(model[0].to_sequential(), nn.ReLU(), model[2].to_sequential()).double()(x.double())
    model = network()
    times = kegfast.autotune(model, x)
    assert [sorted(seconds) for seconds in times.values()] == [
        ["convolutions", "direct", "winograd"],
        ["convolutions", "direct"],
    ]
    assert all(s > 0 for seconds in times.values() for s in seconds.values())
    assert set(cpu.table().values()) <= set(cpu.FORMS)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", cpu.FORMS)
def test_the_chosen_form_runs(form: cpu.Form) -> None:
    layer, x = network()[0], torch.randn(1, 48, 8, 8)
    with torch.no_grad():
        want = layer.to_sequential()(x)
        for _ in range(3):
            layer(x)  # settled before the choice
        choose(layer, x, form)
        for _ in range(4):
            torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
            assert kegfast.last_kernel().split()[0] == ("unfused" if form == "convolutions" else form)
        weights = layer.first.weight, layer.core.weight, layer.last.weight, layer.last.bias
        y = kegfast.functional.tucker_conv2d(x, *weights, padding=1)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        assert kegfast.last_kernel().split()[0] == ("unfused" if form == "convolutions" else form)
        layer(torch.randn(2, 48, 8, 8))  # another shape is none of its business
        assert kegfast.last_kernel() != "unfused"


def test_backend_native_insists() -> None:
    layer, x = network()[0], torch.randn(1, 48, 8, 8)
    choose(layer, x, "convolutions")
    with torch.no_grad(), kegfast.backend("native"):
        layer(x)
        assert kegfast.last_kernel() != "unfused"


def test_gradients_under_a_choice() -> None:
    model, x = network(), torch.randn(2, 48, 12, 10)
    choose(model, x, "convolutions")
    model(x).sum().backward()
    assert model[0].core.weight.grad is not None


def test_choices_are_kept_for_later_processes(monkeypatch) -> None:
    model, x = network(), torch.randn(1, 48, 8, 8)
    kegfast.autotune(model, x)
    known = dict(cpu.table())
    assert len(known) == 2
    monkeypatch.setattr(cpu, "_table", None)
    assert cpu.table() == known
    other = TuckerConv2d(8, 8, 3, (4, 4)).eval()
    kegfast.autotune(other, torch.randn(1, 8, 6, 6))
    assert len(cpu.read_table(cpu.cache_path())) == 3


def test_a_modules_mode_is_left_alone() -> None:
    model = nn.Sequential(network()[0], nn.BatchNorm2d(64)).train()
    before = model[1].running_mean.clone()
    kegfast.autotune(model, torch.randn(1, 48, 8, 8))
    assert model.training
    assert model[1].training
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"forms": {"a": "b"}}',
        json.dumps({"versions": choices.versions(), "forms": {"1 2": "direct"}}),
    ],
)
def test_a_broken_table_is_named_and_left_aside(text: str, caplog) -> None:
    cpu.cache_path().parent.mkdir(parents=True)
    cpu.cache_path().write_text(text)
    with pytest.raises(ValueError, match="forms that autotune measured"):
        cpu.read_table(cpu.cache_path())
    assert cpu.table() == {}
    assert "left aside" in caplog.text


def test_a_table_of_other_versions_is_left_aside() -> None:
    kegfast.autotune(network()[0], torch.randn(1, 48, 8, 8))
    content = json.loads(cpu.cache_path().read_text())
    content["versions"]["torch"] = "0.1"
    cpu.cache_path().write_text(json.dumps(content))
    assert cpu.read_table(cpu.cache_path()) == {}


@pytest.mark.parametrize(
    "arguments",
    [(None, torch.zeros(1, 48, 8, 8)), (network(), 3), (network(), torch.zeros(1, dtype=torch.int32))],
)
def test_wrong_arguments(arguments) -> None:
    with pytest.raises(TypeError, match="must be"):
        kegfast.autotune(*arguments)
