"""Run by tests/cuda/test_cuda_host.py with the library of host code and kegfast/ops/reference.py."""

import importlib.util
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv[1])
spec = importlib.util.spec_from_file_location("reference", sys.argv[2])
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
ops = torch.ops.kegfast
torch.manual_seed(0)


def check(got, want, tolerance, *what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
    assert got.shape == want.shape, (*what, got.shape, want.shape)
    assert error < tolerance, (*what, error)


metrics, noise_metrics = ("l1", "sqeuclidean", "euclidean", "cosine"), ("sqeuclidean", "euclidean")
for (m, metric), (n, noise_metric), dtype, batch in itertools.product(
    enumerate(metrics), enumerate(noise_metrics), (torch.float32, torch.bfloat16, torch.float16), (9, 70)
):
    noises, samples = torch.randn(batch, 3), torch.randn(6, batch).to(dtype).T  # not contiguous
    got = ops.diversity_forward(noises, samples, m, n, True, True)
    exact = [t.double().requires_grad_() for t in (noises, samples)]
    want = reference.diversity_exponent(*exact, metric, noise_metric)
    for value, wanted in zip(got, (want.detach(), *torch.autograd.grad(want, exact)), strict=True):
        check(value, wanted, 1e-6, metric, noise_metric, dtype)
    assert ops.diversity_forward(noises, samples, m, n, False, False)[1].numel() == 0

tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
cases = [  # x, R1, R2, K, kernel, padding, dilation
    ((2, 16, 6, 7), 8, 8, 16, (3, 3), 1, 1),
    ((1, 6, 8, 8), 3, 5, 10, (5, 3), 0, 1),
    ((2, 5, 7, 7), 4, 9, 6, (3, 3), 2, 2),
]
for (shape, r1, r2, k, kernel, padding, dilation), dtype, layout in itertools.product(
    cases, tolerance, (torch.channels_last, torch.contiguous_format)
):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    first = torch.randn(shape[1], r1).to(dtype).T[:, :, None, None]  # not contiguous
    core, last = torch.randn(r2, r1, *kernel).to(dtype), torch.randn(k, r2, 1, 1).to(dtype)
    bias = torch.randn(k).to(dtype)
    exact = [t.double().requires_grad_() for t in (x, first, core, last)]
    want = reference.tucker_conv2d(*exact, bias.double(), (1, 1), (padding,) * 2, (dilation,) * 2, None)
    ints = (1, 1, padding, padding, dilation, dilation)
    for form in range(4):
        y = ops.tucker2_as(x, first, core, last, bias, *ints, True, form)
        check(y, want.detach().relu(), tolerance[dtype], "tucker2_as", shape, dtype)
        assert y.is_contiguous(memory_format=layout)
        assert y.dtype == dtype
    plain = ops.tucker2(x, first, core, last, None, None, *ints, False)
    check(plain, want.detach() - bias.double()[:, None, None], tolerance[dtype], "tucker2", shape, dtype)
    y, t1, t2 = ops.tucker2_forward(x, first, core, last, bias, *ints, False, True)
    z1 = F.conv2d(exact[0], exact[1]).detach()
    check(y, want.detach(), tolerance[dtype], "y", shape, dtype)
    check(t1.permute(0, 3, 1, 2), F.pad(z1, (padding,) * 4), tolerance[dtype], "t1", shape, dtype)
    z2 = F.conv2d(z1, exact[2].detach(), None, 1, padding, dilation)
    check(t2.permute(0, 3, 1, 2), z2, tolerance[dtype], "t2", shape, dtype)
    assert ops.tucker2_forward(x, first, core, last, bias, *ints, False, False)[1].numel() == 0
    grad = torch.randn(want.shape).to(dtype).contiguous(memory_format=layout)
    wanted = torch.autograd.grad(want, exact, grad.double())
    for needs in ((1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)):
        got = ops.tucker2_backward(grad, x, t1, t2, first, core, last, *ints[2:], *map(bool, needs))
        for value, exact_value, need in zip(got, wanted, needs, strict=True):
            if need:
                check(value, exact_value, 2 * tolerance[dtype], "gradient", shape, dtype, layout, needs)
            else:
                assert value.numel() == 0

soft_tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
for dtype, classes in itertools.product(soft_tolerance, (10, 1001)):
    student, teacher = torch.randn(classes, 6).to(dtype).T, torch.randn(6, 2, classes).to(dtype)[:, 1]
    for want_gradient in (True, False):
        loss, gradient = ops.soft_target_forward(student, teacher, 3.0, want_gradient)
        exact = student.double(), teacher.double(), 3.0
        check(loss, reference.soft_target(*exact), soft_tolerance[dtype], "soft_target", dtype)
        assert loss.dtype == gradient.dtype == dtype
        if want_gradient:
            wanted = reference.soft_target_gradient(*exact)
            check(gradient, wanted, soft_tolerance[dtype], "soft_target gradient", dtype)
        else:
            assert gradient.numel() == 0

first, core, last = torch.randn(2, 4, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(6, 3, 1, 1)


def tucker2(x, stride=1, padding=1):
    return ops.tucker2_as(x, first, core, last, None, stride, 1, padding, padding, 1, 1, True, 0)


assert tucker2(torch.randn(0, 4, 5, 5)).shape == (0, 6, 5, 5)
for bad in (
    lambda: tucker2(torch.randn(1, 3, 5, 5)),
    lambda: tucker2(torch.randn(1, 4, 2, 2), padding=0),
    lambda: tucker2(torch.randn(1, 4, 5, 5), stride=0),
    lambda: tucker2(torch.randn(1, 4, 5, 5).double()),
    lambda: ops.soft_target_forward(torch.randn(3, 4), torch.randn(3, 5), 1.0, True),
    lambda: ops.soft_target_forward(torch.randn(3, 4), torch.randn(3, 4).half(), 1.0, True),
    lambda: ops.soft_target_forward(torch.randn(3, 4), torch.randn(3, 4), 0.0, True),
    lambda: ops.soft_target_forward(torch.randn(0, 4), torch.randn(0, 4), 1.0, True),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(5, 3), 0, 0, True, True),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(4, 3), 4, 0, True, True),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(4, 3).double(), 0, 0, True, True),
):
    with pytest.raises(RuntimeError, match="must be"):
        bad()
print("all right")
