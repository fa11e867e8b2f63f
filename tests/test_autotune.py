"""kegfast.autotune on the CPU: what it measures, what later calls run, what it keeps in the user's cache."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from needs import needs_native
from torch import nn

import kegfast
from kegfast._tuning import layer_calls
from kegfast.dispatch import cache as choices
from kegfast.dispatch import cpu
from kegfast.dispatch.forms import Form
from kegfast.nn import TuckerConv2d

pytestmark = needs_native


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    """An empty cache folder, and no choice that outlives the test."""
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setattr(cpu, "_table", None)
    yield
    for shape in cpu.table():
        cpu.prefer(shape, None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = TuckerConv2d(48, 64, 3, (32, 32), padding=1), TuckerConv2d(64, 16, 3, (8, 8), stride=2)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


def choose_everywhere(model: nn.Module, x: torch.Tensor, form: Form) -> None:
    """As if `form` had been measured to be the fastest everywhere."""
    for call in layer_calls(model, x):
        shape = cpu.shape_of(call.x, call.core, call.last.shape[0], call.geometry)
        cpu.table()[shape] = form
        cpu.prefer(shape, form)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_form_is_measured_and_right(layout) -> None:
    model, x = network(), torch.randn(2, 48, 12, 10).contiguous(memory_format=layout)
    want = nn.Sequential(model[0].to_sequential(), nn.ReLU(), model[2].to_sequential()).double()(x.double())
    model = network()
    times = kegfast.autotune(model, x)
    unfused = ["convolutions"] if layout is torch.channels_last else []
    forms = [sorted(seconds) for seconds in times.values()]
    assert forms == [[*unfused, "direct", "winograd"], [*unfused, "direct"]]
    assert all(s > 0 for seconds in times.values() for s in seconds.values())
    assert set(cpu.table().values()) <= set(cpu.FORMS)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", cpu.FORMS)
def test_the_chosen_form_runs(form: Form) -> None:
    layer, x = network()[0], torch.randn(1, 48, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = layer.to_sequential()(x)
        for _ in range(3):
            layer(x)  # settled before the choice
        choose_everywhere(layer, x, form)
        for _ in range(4):
            torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
            assert cpu.runs() == form
        weights = layer.first.weight, layer.core.weight, layer.last.weight, layer.last.bias
        y = kegfast.functional.tucker_conv2d(x, *weights, padding=1)
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
        assert kegfast.last_kernel() != "unfused"  # which only a layer can pack for
        layer(torch.randn(2, 48, 8, 8))  # another shape is none of its business
        assert kegfast.last_kernel() != "unfused"


def test_backend_native_insists() -> None:
    layer, x = settled_convolutions()
    with torch.no_grad(), kegfast.backend("native"):
        layer(x)
        assert kegfast.last_kernel() != "unfused"


def test_gradients_under_a_choice() -> None:
    model, x = network(), torch.randn(2, 48, 12, 10)
    choose_everywhere(model, x, "convolutions")
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


def packaged_class(**changes) -> dict:
    return {"releases": choices.releases(), "forms": {}} | changes


def test_the_packaged_table_goes_first_and_the_users_file_last(monkeypatch) -> None:
    model, x = network(), torch.randn(1, 48, 8, 8).contiguous(memory_format=torch.channels_last)
    kegfast.autotune(model, x)
    (known, form), *rest = cpu.table().items()
    other = next(f for f in cpu.FORMS if f != form)
    unknown = (2, *known[1:])
    cpu.write_packaged({known: other, unknown: "convolutions"}, cpu.PACKAGED)
    monkeypatch.setattr(cpu, "_table", None)
    assert cpu.table() == {known: form, unknown: "convolutions"} | dict(rest)
    with torch.no_grad():
        model[0](x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    assert kegfast.last_kernel() == "unfused"


def test_the_packaged_table_holds_for_its_class_and_releases() -> None:
    shape = tuple(range(17))
    other = {"another processor": packaged_class()}
    cpu.PACKAGED.write_text(json.dumps(other))
    cpu.write_packaged({shape: "direct"}, cpu.PACKAGED)
    assert cpu.read_packaged(cpu.PACKAGED) == {shape: "direct"}
    content = json.loads(cpu.PACKAGED.read_text())
    assert content.keys() == {"another processor", cpu.machine_class()}
    content[cpu.machine_class()]["releases"]["torch"] = "0.1"
    cpu.PACKAGED.write_text(json.dumps(content))
    assert cpu.read_packaged(cpu.PACKAGED) == {}


def test_what_is_packaged_can_be_read() -> None:
    path = Path(cpu.__file__).with_name("cpu_table.json")
    if not path.exists():
        pytest.skip("no class of machines was measured")
    for name, found in json.loads(path.read_text()).items():
        assert isinstance(choices.checked_forms(found, cpu.FORMS, path), dict), name
        assert found["releases"].keys() == choices.releases().keys()


@pytest.mark.parametrize(
    "text", ["", "[]", json.dumps({cpu.machine_class(): packaged_class(forms={"1": 2})})]
)
def test_a_broken_packaged_table_is_left_aside(text: str, caplog) -> None:
    cpu.PACKAGED.write_text(text)
    assert cpu.table() == {}
    assert "left aside" in caplog.text


# ---- the unfused form


def settled_convolutions() -> tuple[TuckerConv2d, torch.Tensor]:
    """A layer that runs as oneDNN's convolutions."""
    layer, x = network()[0], torch.randn(2, 48, 9, 8).contiguous(memory_format=torch.channels_last)
    choose_everywhere(layer, x, "convolutions")
    with torch.no_grad():
        layer(x)
    assert kegfast.last_kernel() == "unfused"
    return layer, x


@pytest.mark.parametrize("activation", [None, "relu"])
def test_convolutions_are_right(activation: str | None) -> None:
    layer, x = settled_convolutions()
    layer.activation = activation
    with torch.no_grad():
        want = copy.deepcopy(layer).double().to_sequential()(x.double()).float()
        for _ in range(3):
            y = layer(x)
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
            assert y.is_contiguous(memory_format=torch.channels_last)
        layer(x.contiguous())
        assert cpu.runs() != "convolutions"


def in_place(layer: TuckerConv2d) -> None:
    with torch.no_grad():
        layer.core.weight.mul_(-2)


def uncounted(layer: TuckerConv2d) -> None:
    layer.last.weight.data.mul_(3)


def another_view(layer: TuckerConv2d) -> None:
    layer.core.weight.data = layer.core.weight.data.mT


def another_stride(layer: TuckerConv2d) -> None:
    layer.core.stride = (2, 1)


def other_bias(layer: TuckerConv2d) -> None:
    layer.last.bias.data.add_(1)


@pytest.mark.parametrize("change", [in_place, uncounted, another_view, another_stride, other_bias])
def test_convolutions_are_never_stale(change) -> None:
    layer, x = settled_convolutions()
    change(layer)
    if change is another_stride:
        choose_everywhere(layer, x, "convolutions")
    with torch.no_grad():
        want = layer.to_sequential()(x)
        for _ in range(3):
            torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_copies_of_packed_convolutions_are_empty() -> None:
    layer, x = settled_convolutions()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            layer.core.weight.zero_()
            want = other.to_sequential()(x)
            torch.testing.assert_close(other(x), want, atol=1e-5, rtol=1e-5)


def test_where_onednn_is_switched_off_the_kernels_run() -> None:
    layer, x = settled_convolutions()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert kegfast.last_kernel() != "unfused"


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
    with pytest.raises(ValueError, match=r"forms that autotune measured|expected JSON"):
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


def test_autotune_takes_inputs_by_keyword(tmp_path, monkeypatch):
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path))

    class Keywords(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = TuckerConv2d(8, 8, 3, (4, 4))

        def forward(self, *, pixels, count):
            return self.layer(pixels) * count

    inputs = {"pixels": torch.randn(1, 8, 9, 9), "count": 2}
    assert len(kegfast.autotune(Keywords(), inputs)) == 1
    with pytest.raises(TypeError, match="example_input must be"):
        kegfast.autotune(Keywords(), {"pixels": torch.ones(1, dtype=torch.int64)})
