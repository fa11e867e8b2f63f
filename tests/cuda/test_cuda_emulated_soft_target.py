"""soft_target's CUDA kernels on the fiber emulator: values, gradients, both fiber orders."""

import pytest
import torch
from cuda_emulator import DTYPES, ORDERS, available, error

from kegfast.ops import reference

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


# soft_target: rows of a warp, of a block, and longer than a block keeps; whole and partial vectors.
SOFT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def logits(batch, classes, dtype, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(batch, classes, generator=generator) + offset).to(dtype) for _ in range(2)]


def soft_target_definition(student, teacher, temperature):
    student, teacher = student.double(), teacher.double()
    loss = reference.soft_target(student, teacher, temperature)
    return loss, reference.soft_target_gradient(student, teacher, temperature)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "classes"), [(1, 1), (19, 10), (3, 256), (2, 257), (2, 1000), (2, 4100), (1, 12289), (1, 25000)]
)
def test_soft_target(device, batch, classes, dtype, order):
    student, teacher = logits(batch, classes, dtype)
    loss, gradient = device.soft_target(student, teacher, 4.0, order)
    want, want_gradient = soft_target_definition(student, teacher, 4.0)
    if classes > 1:
        assert error(loss, want) < SOFT_TOLERANCE[dtype]
        assert error(gradient, want_gradient) < SOFT_TOLERANCE[dtype]
    else:
        assert loss == 0
        assert (gradient == 0).all()
    assert torch.equal(device.soft_target(student, teacher, 4.0, order, False)[0], loss)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("descending", [False, True])
def test_soft_target_raises_its_maxima_as_it_goes(device, descending, order):
    """The largest logit in the first or the last of three chunks; offsets that exp cannot hold."""
    student, teacher = (x.sort(1, descending).values for x in logits(1, 30000, torch.float32, offset=1000.0))
    loss, gradient = device.soft_target(student * 5, teacher * 5, 1.0, order)
    want, want_gradient = soft_target_definition(student * 5, teacher * 5, 1.0)
    assert error(loss, want) < 2e-4  # float32 logits of 5000 differ by steps of 5e-4
    assert error(gradient, want_gradient) < 1e-5


def test_soft_target_reads_strided_rows(device):
    wide = logits(5, 64, torch.float32)
    for columns in (slice(3, 43), slice(4, 44)):  # rows that are not, and that are, at multiples of 16 bytes
        student, teacher = (x[:, columns] for x in wide)
        for value, want in zip(
            device.soft_target(student, teacher, 2.0, "ascending"),
            soft_target_definition(student, teacher, 2.0),
            strict=True,
        ):
            assert error(value, want) < 2e-6


def test_soft_target_is_deterministic_over_orders(device):
    student, teacher = logits(3, 5000, torch.float32)
    up, down = (device.soft_target(student, teacher, 4.0, order) for order in ORDERS)
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("classes", [10, 600, 4100])
def test_soft_target_is_the_same_in_any_order(device, classes, seed):
    student, teacher = logits(9 if classes == 10 else 2, classes, torch.float32)
    want = device.soft_target(student, teacher, 4.0, "ascending")
    got = device.soft_target(student, teacher, 4.0, seed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [10, 300])
def test_soft_target_not_finite(device, classes, bad):
    for which in range(2):
        pair = logits(3, classes, torch.float32)
        pair[which][1, classes // 2] = bad
        loss, gradient = device.soft_target(*pair, 4.0, "ascending")
        assert loss.isnan()
        assert gradient[1].isnan().any()
