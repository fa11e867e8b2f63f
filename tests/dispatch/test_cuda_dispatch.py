"""The choice between CUDA forms: never one that was not measured as at least as fast. Needs no GPU."""

import contextlib
import json
import unittest.mock

import pytest
import torch
from needs import needs_native

import kegfast
from kegfast._tuning import layer_calls
from kegfast.dispatch import cuda
from kegfast.dispatch.forms import Form
from kegfast.dispatch.tucker2 import _RUNS, Call, _choose_cuda
from kegfast.ops import _native
from kegfast.ops._operands import Geometry

GEOMETRY = ((1, 1), (1, 1), (1, 1))


def arguments(batch=2, layout=torch.channels_last):
    x = torch.randn(batch, 8, 6, 6).contiguous(memory_format=layout)
    return x, torch.randn(4, 8, 1, 1), torch.randn(5, 4, 3, 3), torch.randn(8, 5, 1, 1), GEOMETRY, False


def times(fused, stages, convolutions):
    values = {"fused": fused, "stages": stages, "convolutions": convolutions}
    return {name: {"eager": eager, "graph": graph} for name, (eager, graph) in values.items()}


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A pretended device: what was measured, by call; no table yet."""
    calls = []

    def measure_forms(*given):
        calls.append(given)
        return times((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))

    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setattr(cuda, "_measured", None)
    monkeypatch.setattr(cuda, "_chosen", {})
    monkeypatch.setattr(cuda, "_follow_tf32", lambda: False)
    monkeypatch.setattr(cuda, "_measure_forms", measure_forms)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return calls


def forget(monkeypatch):
    """What a new process knows: the files."""
    monkeypatch.setattr(cuda, "_measured", None)
    monkeypatch.setattr(cuda, "_chosen", {})


@needs_native
def test_without_a_measurement_torchs_convolutions_run(pretended):
    assert cuda.form(*arguments()) is None
    assert pretended == []
    with kegfast.backend("native"):
        assert cuda.form(*arguments()) == 0


@pytest.mark.parametrize(
    ("measured", "form"),
    [
        (times((1, 1), (2, 2), (3, 3)), "fused"),
        (times((2, 2), (1, 1), (3, 3)), "stages"),
        (times((4, 1), (3, 2), (3, 3)), "stages"),  # the fastest graph is slower where it is called by itself
        (times((4, 1), (1, 4), (3, 3)), "convolutions"),
        (times((3, 3), (4, 4), (3, 3)), "fused"),  # a tie is not slower
    ],
)
def test_the_fastest_form_that_is_nowhere_slower(measured, form):
    assert cuda.fastest(measured) == form


def test_cudnn_benchmark_measures_once_and_for_later_processes(pretended, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert [cuda.form(*arguments()) for _ in range(3)] == [1, 1, 1]
    assert len(pretended) == 1
    assert cuda.form(*arguments(batch=3)) == 1
    assert len(pretended) == 2
    forget(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert [cuda.form(*arguments(batch)) for batch in (2, 3, 4)] == [1, 1, None]
    assert len(pretended) == 2


def test_nothing_is_measured_inside_a_graph(pretended, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.form(*arguments()) is None
    assert pretended == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda.form(*arguments()) == 1


def test_layouts_and_training_are_measured_apart(pretended, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    x, first, core, last, geometry, _ = arguments()
    for training in (False, True):
        for image in (x, x.contiguous()):
            for weight in (core, core.contiguous(memory_format=torch.channels_last)):
                assert cuda.form(image, first, weight, last, geometry, training) == 1
    assert len(pretended) == 8
    assert len(json.loads(cuda.cache_path().read_text())["forms"]) == 8


def test_compiling_takes_torchs_convolutions(pretended, monkeypatch):
    cuda._keep({cuda._key(*arguments()): times((1, 1), (2, 2), (3, 3))})
    assert cuda.form(*arguments()) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cuda.form(*arguments()) is None


def test_another_version_measures_anew(pretended, monkeypatch):
    cuda._keep({cuda._key(*arguments()): times((1, 1), (2, 2), (3, 3))})
    content = json.loads(cuda.cache_path().read_text())
    content["versions"]["torch"] = "another"
    cuda.cache_path().write_text(json.dumps(content))
    forget(monkeypatch)
    assert cuda.form(*arguments()) is None


def test_tables_are_saved_and_loaded(pretended, monkeypatch, tmp_path):
    cuda._keep({cuda._key(*arguments()): times((2, 2), (1, 1), (3, 3))})
    cuda.save_table(tmp_path / "table.json")
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "empty"))
    forget(monkeypatch)
    assert cuda.form(*arguments()) is None
    cuda.load_table(tmp_path / "table.json")
    assert cuda.form(*arguments()) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"forms": {"a": "fastest"}}', '{"forms": {"a": [1]}}', "\0"]
)
def test_a_wrong_table_is_refused_or_left_aside(pretended, text):
    path = cuda.cache_path()
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"forms that autotune measured|expected JSON"):
        cuda.load_table(path)
    assert cuda.form(*arguments()) is None


def test_a_folder_that_cannot_be_written_costs_the_file_alone(pretended, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "file"))
    cuda._keep({cuda._key(*arguments()): times((1, 1), (2, 2), (3, 3))})
    assert cuda.form(*arguments()) == 1
    assert "not kept" in caplog.text


def test_autotune_finds_every_layer(pretended):
    layer = kegfast.nn.TuckerConv2d(8, 8, 3, rank=(4, 5), padding=1)
    found = layer_calls(torch.nn.Sequential(layer, layer), torch.randn(2, 8, 6, 6))
    assert [tuple(call.x.shape) for call in found] == [(2, 8, 6, 6)] * 2
    assert found[0].core is layer.core.weight
    assert found[0].geometry == GEOMETRY


@pytest.mark.parametrize("form", cuda.FORMS)
def test_every_form_of_a_table_runs(form, pretended):
    x, *weights, geometry, training = arguments()
    call = Call(x, (*weights, None), geometry, None, False, None, None)
    cuda.table()[cuda._key(x, *weights, geometry, training)] = form
    taken = _choose_cuda(call)
    assert taken == (Form.REFERENCE if form is Form.CONVOLUTIONS else form)
    assert taken in _RUNS


def test_training_is_measured_on_devices_alone():
    with pytest.raises(ValueError, match=r"^training must be False on the CPU"):
        kegfast.autotune(torch.nn.Identity(), torch.randn(1, 8, 6, 6), training=True)


def test_keys_of_tables_are_those_of_earlier_releases(pretended):
    x, first, core, last, geometry, training = arguments()
    key = cuda._key(x, first, core, last, geometry, training)
    assert key == cuda._key(x, first, core, last, Geometry(*geometry), training)
    assert str(tuple(GEOMETRY)) in key


@pytest.fixture
def precision():
    """torch's settings as they were."""
    conv = torch.backends.cudnn.conv
    before = torch.backends.cudnn.fp32_precision, conv.fp32_precision
    yield
    torch.backends.cudnn.fp32_precision, conv.fp32_precision = before


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_tf32_is_read_also_after_torchs_newer_setting(monkeypatch, precision, setting):
    told = []
    monkeypatch.setattr(torch.ops.kegfast, "cuda_allow_tf32", told.append, raising=False)
    monkeypatch.setattr(cuda, "_tf32", None)
    torch.backends.cudnn.conv.fp32_precision = "none"  # follows cudnn's, whatever was set before
    torch.backends.cudnn.fp32_precision = setting  # from here on allow_tf32 may raise
    assert cuda._follow_tf32() == (setting == "tf32")
    assert told == [setting == "tf32"]
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert cuda._follow_tf32() is False


class Pretended:
    """What torch.cuda offers to time calls with; every object knows on which device it was made."""

    def __init__(self, monkeypatch):
        self.current, self.made = 0, []
        for name in ("Stream", "Event", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: self.thing())
        monkeypatch.setattr(torch.cuda, "current_stream", self.thing)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def on(self, device):
        before, self.current = self.current, self.current if device is None else device.index
        yield
        self.current = before

    def thing(self):
        self.made.append(self.current)
        return unittest.mock.Mock(device=self.current, **{"elapsed_time.return_value": 1.0})

    def graph(self, graph, stream, **_):
        assert stream.device == graph.device
        return contextlib.nullcontext()


def test_times_are_taken_on_the_device_of_the_call(monkeypatch):
    """Events of another device's stream would time nothing."""
    pretended = Pretended(monkeypatch)
    calls = []
    times = cuda.measure({"it": lambda: calls.append(pretended.current)}, device=torch.device("cuda", 1))
    assert times["it"].keys() == {"eager", "graph"}
    assert set(pretended.made) == set(calls) == {1}
    assert pretended.current == 0


def test_forms_are_measured_on_xs_device(monkeypatch):
    given = {}
    monkeypatch.setattr(cuda, "_is_right", lambda *_: True)
    monkeypatch.setattr(cuda, "measure", lambda runners, **options: given.update(options) or {})
    *tensors, geometry, training = arguments()
    cuda._measure_forms(*(t.to("meta") for t in tensors), geometry, training)
    assert given["device"] == torch.device("meta")


@needs_native
@pytest.mark.parametrize("why", ["", "no kernel image is available for execution on the device"])
def test_a_device_that_cannot_run_the_kernels_gets_torchs_operators(monkeypatch, caplog, why):
    asked = []
    monkeypatch.setattr(
        torch.ops.kegfast, "cuda_why_not", lambda index: asked.append(index) or why, raising=False
    )
    monkeypatch.setattr(_native, "_runs", {})
    card = torch.device("cuda", 1)
    assert [_native.runs_on(card) for _ in range(3)] == [not why] * 3
    assert asked == [1]
    assert caplog.text.count("cuda:1") == (1 if why else 0)
    assert why in caplog.text
    assert _native.runs_on(torch.device("cpu"))
    with kegfast.backend("native"):  # insists: the operator itself says what is wrong
        assert _native.runs_on(card)


def test_a_form_that_fails_or_errs_is_not_measured(monkeypatch, caplog):
    """On a card that nobody has seen a form may do either: the others and torch's convolutions remain."""
    *tensors, geometry, training = arguments()
    right = kegfast.reference.tucker_conv2d(*tensors, None, *geometry, None)

    def answer(*given):
        number = given[-1]
        if number == cuda.FORMS["persistent"]:
            raise RuntimeError("no tensor map of this image")
        return right.neg() if number == cuda.FORMS["stages"] else right.clone()

    monkeypatch.setattr(torch.ops.kegfast, "tucker2_as", answer, raising=False)
    monkeypatch.setattr(cuda, "measure", lambda runners, **_: dict.fromkeys(runners))
    assert cuda._measure_forms(*tensors, geometry, training).keys() == {"fused", "convolutions"}
    assert "persistent is left aside: no tensor map" in caplog.text
    assert "stages is left aside: its answer is off by 2" in caplog.text
    tensors[0][0, 0, 0, 0] = float("nan")  # what is not finite tells nothing
    right = kegfast.reference.tucker_conv2d(*tensors, None, *geometry, None)
    assert "stages" in cuda._measure_forms(*tensors, geometry, training)
