"""Every CUDA kernel on the fiber emulator: values, gradients, both orders of the fibers. Needs g++, no GPU."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kegfast import reference
from cuda_emulator import (
    A100_SHARED,
    DTYPES,
    METRICS,
    NOISE_METRICS,
    ORDERS,
    available,
    compile_emulator,
    emulator,
    pointer,
)

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


@pytest.fixture(scope="session")
def device(tmp_path_factory):
    return emulator(tmp_path_factory.mktemp("emulator"))


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def definition(noises, samples, metric, noise_metric):
    noises, samples = noises.double().requires_grad_(), samples.double().requires_grad_()
    exponent = reference.diversity_exponent(noises, samples, metric, noise_metric)
    exponent.backward()
    return exponent.detach(), noises.grad, samples.grad


def draw(batch, noise_size, features, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(batch, noise_size, generator=generator)
    return noises, (torch.randn(batch, features, generator=generator) + 3).to(dtype)


# The batch sizes take the pair kernel, the sort with 1, 4 and 16 warps a feature, and a last partial tile of each.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "noise_size", "features"), [(5, 1, 3), (33, 10, 37), (70, 3, 19), (257, 14, 24)]
)
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
@pytest.mark.parametrize("metric", METRICS)
def test_diversity(device, metric, noise_metric, batch, noise_size, features, dtype, order):
    if batch > 200 and (noise_metric == "euclidean" or dtype == torch.float16):
        pytest.skip("the same kernels as at a smaller batch")
    noises, samples = draw(batch, noise_size, features, dtype)
    got = device.diversity(noises, samples, metric, noise_metric, order)
    for value, want in zip(got, definition(noises, samples, metric, noise_metric), strict=True):
        assert error(value, want) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_diversity_l1_batch_of_1100(device, order):
    noises, samples = draw(1100, 10, 3, torch.float32)
    exponent, _, gradient = device.diversity(noises, samples, "l1", "sqeuclidean", order, noise_grad=False)
    want, _, want_gradient = definition(noises, samples, "l1", "sqeuclidean")
    assert error(exponent, want) < 1e-6
    assert error(gradient, want_gradient) < 1e-6


def test_diversity_within_an_a100s_shared_memory(device):
    noises, samples = draw(1100, 2, 9, torch.bfloat16)
    exponent, _, gradient = device.diversity(
        noises, samples, "l1", "sqeuclidean", "ascending", noise_grad=False, shared=A100_SHARED
    )
    want, _, want_gradient = definition(noises, samples, "l1", "sqeuclidean")
    assert error(exponent, want) < 1e-6
    assert error(gradient, want_gradient) < 1e-6


@pytest.mark.parametrize("batch", [20, 90, 300])
def test_diversity_ties_are_exact(device, batch):
    noises, samples = draw(batch, 10, 8, torch.float32)
    samples = (samples * 2).round() / 2
    samples[:, 3] = 1.5  # a constant column
    samples[::2, 4], samples[1::2, 4] = 0.0, -0.0  # equal values of different bits
    _, _, gradient = device.diversity(noises, samples, "l1", "sqeuclidean", "ascending")
    _, _, want = definition(noises, samples, "l1", "sqeuclidean")
    assert error(gradient, want) < 1e-6
    assert (gradient[:, 3:5] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [20, 90])
@pytest.mark.parametrize("metric", METRICS)
def test_diversity_not_finite(device, metric, batch, bad):
    noises, samples = draw(batch, 4, 11, torch.float32)
    samples[batch // 2, 5] = bad
    for value in device.diversity(noises, samples, metric, "sqeuclidean", "ascending"):
        assert value.isnan().all()


@pytest.mark.parametrize("batch", [20, 90])
def test_diversity_noise_not_finite(device, batch):
    noises, samples = draw(batch, 4, 11, torch.float32)
    noises[3, 2] = float("inf")
    for value in device.diversity(noises, samples, "l1", "sqeuclidean", "ascending"):
        assert value.isnan().all()


def test_diversity_of_one_sample_is_zero(device):
    noises, samples = draw(1, 3, 5, torch.float32)
    for metric in METRICS:
        for value in device.diversity(noises, samples, metric, "sqeuclidean", "ascending"):
            assert (value == 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_diversity_coincident_and_zero_rows(device, metric):
    noises, samples = draw(12, 3, 7, torch.float32)
    samples[3], samples[4] = samples[5], 0
    got = device.diversity(noises, samples, metric, "euclidean", "ascending")
    want = definition(noises, samples, metric, "euclidean")
    assert error(got[0], want[0]) < 1e-6
    assert error(got[1], want[1]) < 1e-6
    assert all(value.isfinite().all() for value in got)
    rest = [i for i in range(12) if i != 4]  # a zero row has no direction; its gradient is 0 here
    assert error(got[2][rest], want[2][rest]) < 1e-6


def test_diversity_is_deterministic_over_orders(device):
    noises, samples = draw(130, 10, 40, torch.bfloat16)
    up, down = (device.diversity(noises, samples, "l1", "sqeuclidean", order) for order in ORDERS)
    for a, b in zip(up, down, strict=True):
        assert torch.equal(a, b)


# The emulator itself: a mistake must show in at least one of the two orders.


def neighbour(device, barrier, order):
    out = torch.empty(64)
    device.call("emulate_neighbour", "broken_error", pointer(out), barrier, ORDERS.index(order))
    return torch.equal(out, torch.arange(1.0, 65) % 64)


def test_emulator_catches_a_missing_barrier(device):
    assert all(neighbour(device, True, order) for order in ORDERS)
    assert not all(neighbour(device, False, order) for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_emulator_catches_a_missing_wait(device, order):
    source = torch.arange(128.0)
    for wait in (True, False):
        out = torch.zeros(128)
        device.call(
            "emulate_copied", "broken_error", pointer(source), pointer(out), wait, ORDERS.index(order)
        )
        assert torch.equal(out, source) == wait


def test_emulator_catches_a_barrier_that_not_all_reach(device):
    with pytest.raises(RuntimeError, match="not all threads come"):
        device.call("emulate_diverged", "broken_error", pointer(torch.empty(1)))


ADDRESS_SANITIZED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
out = (ctypes.c_float * 64)()
print("started", flush=True)
getattr(library, sys.argv[2])(out, *map(int, sys.argv[3:]))
print("finished", flush=True)
"""


@pytest.mark.slow
def test_address_sanitizer(tmp_path):
    library = compile_emulator(tmp_path, "-fsanitize=address", "-g")
    runtime = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}

    def run(*arguments):
        command = [sys.executable, "-c", ADDRESS_SANITIZED, str(library), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    good, bad = run("emulate_neighbour", "1", "0"), run("emulate_past_the_end")
    assert good.returncode == 0, good.stderr
    assert "heap-buffer-overflow" in bad.stderr, bad.stderr
