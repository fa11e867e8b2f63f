"""The fiber emulator itself, and every CUDA kernel on it under AddressSanitizer. Needs g++, no GPU."""

import subprocess

import pytest
import torch
from cuda_emulator import ORDERS, ROOT, available, compile_emulator, pointer

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


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


@pytest.mark.slow
def test_address_sanitizer(tmp_path):
    """Every kernel on buffers of exact length; and a stray access, that it would have been seen."""
    program = compile_emulator(
        tmp_path, "-fsanitize=address", "-g", program=ROOT / "tests/emulator/sanitized/main.cpp"
    )
    good, bad = (
        subprocess.run([program, *arguments], capture_output=True, text=True)
        for arguments in ([], ["past the end"])
    )
    assert good.returncode == 0, good.stderr
    assert "heap-buffer-overflow" in bad.stderr, bad.stderr
