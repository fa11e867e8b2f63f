"""The choice between CUDA forms: never one that was not measured as at least as fast. Needs no GPU."""

import json

import pytest
import torch

import kegfast
from kegfast.dispatch import cuda

GEOMETRY = ((1, 1), (1, 1), (1, 1))


def arguments(batch=2, layout=torch.channels_last):
    x = torch.randn(batch, 8, 6, 6).contiguous(memory_format=layout)
    return x, torch.randn(4, 8, 1, 1), torch.randn(5, 4, 3, 3), torch.randn(8, 5, 1, 1), GEOMETRY, False


def times(fused, stages, convolutions):
    values = zip(cuda.FORMS, (fused, stages, convolutions), strict=True)
    return {name: {"eager": eager, "graph": graph} for name, (eager, graph) in values}


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A pretended device: what was measured, by call; no table yet."""
    calls = []

    def measure_forms(*given):
        calls.append(given)
        return times((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))

    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_PACKAGED", tmp_path / "packaged.json")
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
    with pytest.raises(ValueError, match="forms that autotune measured"):
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
    found = list(cuda._calls(torch.nn.Sequential(layer, layer), torch.randn(2, 8, 6, 6)))
    assert [tuple(x.shape) for x, *_ in found] == [(2, 8, 6, 6)] * 2
    assert found[0][2] is layer.core.weight
    assert found[0][4] == GEOMETRY


def test_autotune_wants_a_device(pretended):
    with pytest.raises(ValueError, match="CUDA device"):
        cuda.autotune(torch.nn.Identity(), torch.randn(1, 8, 6, 6))
