"""The CUDA operators' host code (checks, allocation, strides, gradients) on CPU tensors and the emulator.

The sources are compiled by g++ with another launch.h; registered for the CPU in a process of their own, they
stand where `torch.ops.kegfast`'s CUDA kernels would. Needs g++, no GPU.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = Path(importlib.util.find_spec("torch").origin).parent
SOURCES = ("diversity", "tucker2")

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
    pytest.mark.timeout(1200),  # half a minute on a free core
]

PROGRAM = """
import importlib.util, itertools, sys, torch
import torch.nn.functional as F

torch.ops.load_library(sys.argv[1])
spec = importlib.util.spec_from_file_location("reference", sys.argv[2])
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
ops = torch.ops.kegfast
torch.manual_seed(0)


def check(got, want, tolerance, *what):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()
    assert got.shape == want.shape and error < tolerance, (*what, got.shape, want.shape, error)


metrics, noise_metrics = ("l1", "sqeuclidean", "euclidean", "cosine"), ("sqeuclidean", "euclidean")
for (m, metric), (n, noise_metric), dtype, batch in itertools.product(
    enumerate(metrics), enumerate(noise_metrics), (torch.float32, torch.bfloat16, torch.float16), (9, 70)
):
    noises, samples = torch.randn(batch, 3), torch.randn(6, batch).to(dtype).T  # not contiguous
    got = ops.diversity_forward(noises, samples, m, n, True, True)
    exact = [t.double().requires_grad_() for t in (noises, samples)]
    want = reference.diversity_exponent(*exact, metric, noise_metric)
    for value, wanted in zip(got, (want.detach(), *torch.autograd.grad(want, exact))):
        check(value, wanted, 1e-6, metric, noise_metric, dtype)
    assert ops.diversity_forward(noises, samples, m, n, False, False)[1].numel() == 0

tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
cases = [((2, 16, 6, 7), 8, 8, 16, (3, 3), 1, 1), ((1, 6, 8, 8), 3, 5, 10, (5, 3), 0, 1), ((2, 5, 7, 7), 4, 9, 6, (3, 3), 2, 2)]
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
    for form in range(3):
        y = ops.tucker2_as(x, first, core, last, bias, *ints, True, form)
        check(y, want.detach().relu(), tolerance[dtype], "tucker2_as", shape, dtype)
        assert y.is_contiguous(memory_format=layout) and y.dtype == dtype
    check(ops.tucker2(x, first, core, last, None, None, *ints, False), want.detach() - bias.double()[:, None, None], tolerance[dtype])
    y, t1, t2 = ops.tucker2_forward(x, first, core, last, bias, *ints, False, True)
    z1 = F.conv2d(exact[0], exact[1]).detach()
    check(y, want.detach(), tolerance[dtype], "y", shape, dtype)
    check(t1.permute(0, 3, 1, 2), F.pad(z1, (padding,) * 4), tolerance[dtype], "t1", shape, dtype)
    check(t2.permute(0, 3, 1, 2), F.conv2d(z1, exact[2].detach(), None, 1, padding, dilation), tolerance[dtype], "t2")
    assert ops.tucker2_forward(x, first, core, last, bias, *ints, False, False)[1].numel() == 0
    grad = torch.randn(want.shape).to(dtype).contiguous(memory_format=layout)
    wanted = torch.autograd.grad(want, exact, grad.double())
    for needs in ((True,) * 4, (True, False, False, False), (False, True, True, False), (False, False, False, True)):
        got = ops.tucker2_backward(grad, x, t1, t2, first, core, last, *ints[2:], *needs)
        for value, exact_value, need in zip(got, wanted, needs):
            if need:
                check(value, exact_value, 2 * tolerance[dtype], "gradient", shape, dtype, layout, needs)
            else:
                assert value.numel() == 0

x = torch.randn(0, 4, 5, 5)
first, core, last = torch.randn(2, 4, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(6, 3, 1, 1)
assert ops.tucker2_as(x, first, core, last, None, 1, 1, 1, 1, 1, 1, True, 0).shape == (0, 6, 5, 5)
for bad in (
    lambda: ops.tucker2_as(torch.randn(1, 3, 5, 5), first, core, last, None, 1, 1, 1, 1, 1, 1, True, 0),
    lambda: ops.tucker2_as(torch.randn(1, 4, 2, 2), first, core, last, None, 1, 1, 0, 0, 1, 1, True, 0),
    lambda: ops.tucker2_as(torch.randn(1, 4, 5, 5), first, core, last, None, 0, 1, 1, 1, 1, 1, True, 0),
    lambda: ops.tucker2_as(torch.randn(1, 4, 5, 5).double(), first, core, last, None, 1, 1, 1, 1, 1, 1, True, 0),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(5, 3), 0, 0, True, True),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(4, 3), 4, 0, True, True),
    lambda: ops.diversity_forward(torch.randn(4, 2), torch.randn(4, 3).double(), 0, 0, True, True),
):
    try:
        bad()
    except RuntimeError as error:
        assert "must be" in str(error), error
    else:
        raise AssertionError("a bad argument passed")
print("all right")
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    include = [
        folder,
        ROOT / "tests/emulator/host",
        ROOT / "csrc/cuda",
        ROOT / "csrc",
        ROOT / "tests/emulator",
    ]
    flags = ["-std=c++20", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-I{path}" for path in include] + ["-isystem", str(TORCH / "include")]
    sources = [ROOT / "csrc/ops.cpp", ROOT / "tests/emulator/fibers.cpp"]
    for name in SOURCES:  # a copy, beside which no other launch.h lies
        text = (ROOT / f"csrc/cuda/{name}.cu").read_text()
        text = text.replace("is_cuda()", "is_cpu()").replace("(kegfast, CUDA, m)", "(kegfast, CPU, m)")
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(text)
    objects = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = ["g++", *flags, "-c", str(source), "-o", str(target)]
        objects.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for target, process in objects:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{target.name}:\n{errors}"
    library = folder / "host.so"
    torch_library = str(TORCH / "lib/libtorch_cpu.so")
    command = ["g++", "-shared", *(str(target) for target, _ in objects), torch_library, "-o", str(library)]
    subprocess.check_call(command)
    return library


def test_host_code(library):
    command = [sys.executable, "-c", PROGRAM, str(library), str(ROOT / "kegfast/reference.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all right" in done.stdout
