"""The fiber emulator itself, and every CUDA kernel on it under sanitizers. Needs g++, no GPU."""

import ctypes
import subprocess

import pytest
import torch
from cuda_emulator import H200_SHARED, ORDERS, ROOT, available, compile_emulator, order_number, pointer

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


# The emulator itself: a mistake must show in at least one order.


def neighbor(device, barrier, order):
    out = torch.empty(64)
    device.call("emulate_neighbor", "broken_error", pointer(out), barrier, ORDERS.index(order))
    return torch.equal(out, torch.arange(1.0, 65) % 64)


def test_emulator_catches_a_missing_barrier(device):
    assert all(neighbor(device, True, order) for order in ORDERS)
    assert not all(neighbor(device, False, order) for order in ORDERS)


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


SEEDS = range(24)


def test_only_a_random_order_catches_a_warp_that_comes_first(device):
    out = torch.empty(1)

    def right(order):
        device.call("emulate_first", "broken_error", pointer(out), order_number(order))
        return out.item() == 1

    assert all(right(order) for order in ORDERS)
    assert not all(right(seed) for seed in SEEDS)


def test_blocks_that_rely_on_their_order_differ(device):
    results = []
    for order in (*ORDERS, *SEEDS):
        out = torch.zeros(5)
        device.call("emulate_in_turn", "broken_error", pointer(out), order_number(order))
        results.append(tuple(out.tolist()))
    assert results[0] == (0, 1, 2, 3, 4)
    assert len(set(results)) > 4


def test_shared_memory_that_nobody_wrote_is_poisoned_in_two_ways(device):
    found = set()
    for order in (*ORDERS, *SEEDS):
        out = torch.empty(32)
        device.call("emulate_unwritten", "broken_error", pointer(out), order_number(order))
        found.add(tuple(out.tolist()))
    assert len(found) > 2


def test_tensor_cores_truncate(device):
    out = torch.empty(32)
    device.call("emulate_truncated", "broken_error", pointer(out))
    assert (out == 1).all()


@pytest.mark.parametrize("order", [*ORDERS, 0, 1])
def test_teams_may_differ_in_their_own_barriers_alone(device, order):
    out = torch.full((2,), -1.0)
    device.call("emulate_teams", "broken_error", pointer(out), True, order_number(order))
    assert out.tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="not all threads come"):
        device.call("emulate_teams", "broken_error", pointer(out), False, order_number(order))


def test_a_block_has_no_more_shared_memory_than_the_device(device):
    out = torch.empty(32)
    device.call("emulate_shared", "broken_error", pointer(out), ctypes.c_int64(H200_SHARED))
    with pytest.raises(RuntimeError, match="232449 bytes of shared memory, of which it has 232448"):
        device.call("emulate_shared", "broken_error", pointer(out), ctypes.c_int64(H200_SHARED + 1))


@pytest.mark.parametrize("way", range(8))
def test_sixteen_bytes_lie_at_a_multiple_of_sixteen(device, way):
    """Whatever reads or writes them: the hardware would trap."""
    out = torch.empty(33, 4)
    out = out.flatten()[-out.data_ptr() % 16 // 4 :]
    if way == 0:
        device.call("emulate_off_by_some", "broken_error", pointer(out), way)
        return
    with pytest.raises(RuntimeError, match="misaligned"):
        device.call("emulate_off_by_some", "broken_error", pointer(out), way)


def test_bulk_copies_want_strides_that_grow(device):
    def ask(*strides):
        device.call("emulate_tensor_map", "broken_error", *map(ctypes.c_int64, strides))

    ask(40, 120, 240)
    for strides in (
        (41, 123, 246),
        (120, 40, 240),
        (40, 120, 0),
        (-40, 120, 240),
        (40, 100, 200),
        (40, 120, 1 << 39),
    ):
        with pytest.raises(RuntimeError, match="bulk copies want strides"):
            ask(*strides)


def boxed(device, mistake, order):
    """Whether rows -1 and 0 of an image of 2 x 3 pixels of 40 channels came doubled, and nothing else."""
    source = torch.arange(1, 241, dtype=torch.int16).view(2, 3, 40)
    out = torch.full((2, 3, 40), -1, dtype=torch.int16)
    arguments = pointer(source), pointer(out), mistake, order_number(order)
    device.call("emulate_boxed", "broken_error", *arguments)
    want = torch.full((2, 3, 40), -1, dtype=torch.int16)
    want[:, 0] = 2 * source[:, 0]  # the box's other column is left of the image
    return torch.equal(out, want)


def test_emulator_catches_mistakes_with_bulk_copies(device):
    orders = [*ORDERS, *range(4)]
    assert all(boxed(device, 0, order) for order in orders)
    with pytest.raises(RuntimeError, match="two bulk loads at once"):
        boxed(device, 1, 0)
    for mistake in (2, 3, 4):  # no wait for the load; no fence before the store; no wait for the store
        assert not all(boxed(device, mistake, order) for order in orders)


@pytest.mark.slow
def test_sanitizers(tmp_path):
    """Every kernel on buffers of exact length; and a stray and a misaligned access, that they are seen."""
    main = ROOT / "tests/emulator/sanitized/main.cpp"
    program = compile_emulator(tmp_path, "-fsanitize=address,alignment", "-g", "-O0", program=main)
    good, stray, misaligned = (
        subprocess.run([program, *arguments], capture_output=True, text=True)
        for arguments in ([], ["past the end"], ["misaligned"])
    )
    assert good.returncode == 0, good.stderr
    assert "misaligned" not in good.stderr, good.stderr
    assert "heap-buffer-overflow" in stray.stderr, stray.stderr
    assert "misaligned address" in misaligned.stderr, misaligned.stderr
