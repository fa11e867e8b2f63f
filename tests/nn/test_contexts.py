"""A TuckerConv2d in torch's contexts (backends, threads, autocast): what its convolutions give."""

import contextlib

import pytest
import torch
from tucker2_cases import settled


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


CONTEXTS = {
    "mkldnn off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "nnpack off": lambda: torch.backends.nnpack.flags(enabled=False),
    "cudnn": lambda: cudnn_benchmark(),
    "deterministic": lambda: deterministic(),
    "one thread": lambda: threads(1),
    "inference": lambda: torch.inference_mode(),
    "multithreading off": lambda: torch.autograd.set_multithreading_enabled(False),
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def cudnn_benchmark():
    """By the attribute: torch's own context writes its settings of TF32 as well."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_change_nothing(name: str, layout: torch.memory_format) -> None:
    layer, x = settled()
    x = x.contiguous(memory_format=layout)
    plain = layer.to_sequential()
    for training in (False, True):
        with torch.set_grad_enabled(training), CONTEXTS[name]():
            for _ in range(3):
                close(layer(x), plain(x))
        with torch.set_grad_enabled(training):
            close(layer(x), plain(x))


def test_autocast_between_calls() -> None:
    layer, x = settled()
    plain = layer.to_sequential()
    for training in (False, True):
        with torch.set_grad_enabled(training):
            for dtype in (torch.bfloat16, torch.float16):
                for enabled in (True, False, True):
                    with torch.autocast("cpu", dtype, enabled=enabled):
                        got, want = layer(x), plain(x)
                        assert got.dtype == want.dtype
                        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
                    assert layer(x).dtype == torch.float32
                    close(layer(x), plain(x))


def test_profiles_name_the_operator_in_every_call() -> None:
    layer, x = settled()
    for _ in range(3):
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        ):
            layer(x)
        assert any("conv" in event.key or "tucker2" in event.key for event in seen.key_averages())
