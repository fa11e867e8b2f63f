"""The CUDA operators on a real device: values, gradients, opcheck, graphs, streams, devices.

For races and stray accesses `make sanitize-cuda` runs the tests named so under compute-sanitizer.
"""

import os

import pytest
import torch

import kegfast
from kegfast import functional
from kegfast.dispatch import cuda
from kegfast.ops import reference

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and kegfast.build_info()["cuda_kernels"]),
    reason="needs a CUDA device, a torch with CUDA and a kegfast that was built with nvcc",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CASES = [  # (N, C, H, W), ranks, K, kernel, stride, padding, dilation
    ((2, 16, 9, 9), (8, 8), 16, 3, 1, 1, 1),
    ((3, 6, 14, 14), (3, 8), 16, 5, 1, 0, 1),
    ((2, 20, 7, 11), (10, 25), 50, 3, 2, 1, 1),
    ((1, 32, 12, 10), (20, 70), 40, (3, 1), (1, 2), (2, 0), (2, 1)),
    ((8, 64, 56, 56), (16, 16), 64, 3, 1, 1, 1),
    ((1, 512, 7, 7), (128, 128), 512, 3, 1, 1, 1),
    ((2, 256, 14, 14), (130, 100), 136, 3, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def native(monkeypatch, tmp_path):
    """The kernels themselves, measured or not; exact float32; a table of its own."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "_measured", None)
    monkeypatch.setattr(cuda, "_chosen", {})
    with kegfast.backend("native"):
        yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        # A kernel did what it may not: this process has lost its device for all tests to come.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist starts another worker
        raise


def error(got, want):
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def diversity(batch, features, dtype, nz=10):
    noises = torch.randn(batch, nz, device="cuda", requires_grad=True)
    samples = (torch.randn(batch, features, device="cuda") + 3).to(dtype).requires_grad_()
    return noises, samples


def tucker2(case, dtype, layout=torch.channels_last):
    shape, (r1, r2), k, kernel, stride, padding, dilation = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)

    def normal(*size, fan=1):
        return (torch.randn(size, device="cuda") / fan**0.5).to(dtype)

    x = normal(*shape).contiguous(memory_format=layout)
    first, last = normal(r1, shape[1], 1, 1, fan=shape[1]), normal(k, r2, 1, 1, fan=r2)
    core = normal(r2, r1, *kernel, fan=r1 * kernel[0] * kernel[1])
    return [t.requires_grad_() for t in (x, first, core, last, normal(k))], (stride, padding, dilation)


def exact_tucker2(tensors, geometry, activation=None):
    pair = torch.nn.modules.utils._pair
    return reference.tucker_conv2d(*(t.double() for t in tensors), *map(pair, geometry), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 5, 64, 65, 256, 257, 1024, 1100])
@pytest.mark.parametrize("noise_metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("metric", ["l1", "sqeuclidean", "euclidean", "cosine"])
def test_diversity(metric, noise_metric, batch, dtype):
    noises, samples = diversity(batch, 77, dtype)
    options = {"metric": metric, "noise_metric": noise_metric, "log": True}
    got = functional.diversity_loss(noises, samples, **options)
    got_gradients = torch.autograd.grad(got, (noises, samples))
    exact = [t.detach().double().requires_grad_() for t in (noises, samples)]
    want = reference.diversity_exponent(*exact, metric, noise_metric)
    assert error(got, want) < 2e-6
    if batch > 1:
        for value, wanted in zip(got_gradients, torch.autograd.grad(want, exact), strict=True):
            assert error(value, wanted) < TOLERANCE[value.dtype]


@pytest.mark.parametrize("batch", [4096, 5000, 16384])
def test_diversity_l1_large(batch):
    noises, samples = diversity(batch, 64, torch.float32)
    got = functional.diversity_loss(noises, samples, log=True)
    (gradient,) = torch.autograd.grad(got, samples)
    few = torch.arange(0, batch, batch // 50, device="cuda")  # rows whose gradient is checked one by one
    z, x = noises.detach().double(), samples.detach().double()
    weights = torch.cdist(z[few], z).square() / z.shape[1]
    for row, i in enumerate(few):
        want = -2 * (weights[row, :, None] * (x[i] - x).sign()).sum(0) / (batch**2 * x.shape[1])
        assert error(gradient[i], want) < 5e-6


def test_diversity_is_deterministic():
    noises, samples = diversity(1024, 3072, torch.bfloat16)
    results = [torch.ops.kegfast.diversity_forward(noises, samples, 0, 0, True, True) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("form", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tucker2(case, dtype, form, layout):
    tensors, geometry = tucker2(case, dtype, layout)
    ints = [n for value in geometry for n in (value if isinstance(value, tuple) else (value, value))]
    with torch.no_grad():
        y = torch.ops.kegfast.tucker2_as(*tensors, *ints, True, form)
        want = exact_tucker2(tensors, geometry, "relu")
    assert error(y, want) < TOLERANCE[dtype]
    assert y.is_contiguous(memory_format=layout)


def test_tucker2_follows_torchs_tf32_switch():
    tensors, geometry = tucker2(CASES[4], torch.float32)
    want = exact_tucker2(tensors, geometry)
    errors = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        errors.append(error(functional.tucker_conv2d(*tensors, *geometry), want))
    assert errors[0] < 2e-6 < errors[1] < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tucker2_gradients(case, dtype):
    tensors, geometry = tucker2(case, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, want = functional.tucker_conv2d(*tensors, *geometry), exact_tucker2(exact, geometry)
    grad = torch.randn_like(want)
    gradients = torch.autograd.grad(y, tensors, grad.to(dtype))
    for value, wanted in zip(gradients, torch.autograd.grad(want, exact, grad), strict=True):
        assert error(value, wanted) < 3 * TOLERANCE[dtype]


def test_opcheck_diversity():
    noises, samples = diversity(100, 33, torch.float32)
    arguments = (noises, samples, 0, 0, True, True)
    torch.library.opcheck(torch.ops.kegfast.diversity_forward.default, arguments)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_opcheck_tucker2(layout):
    tensors, _ = tucker2(CASES[0], torch.float32, layout)
    ints = (1, 1, 1, 1, 1, 1)
    torch.library.opcheck(torch.ops.kegfast.tucker2.default, (*tensors, None, *ints, True))
    torch.library.opcheck(torch.ops.kegfast.tucker2_forward.default, (*tensors, *ints, True, True))


def captured(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_capture(dtype):
    noises, samples = diversity(256, 1024, dtype)
    tensors, geometry = tucker2(CASES[4], dtype)
    tensors = [t.detach() for t in tensors]

    def run():
        exponent, _, gradient = torch.ops.kegfast.diversity_forward(noises, samples, 0, 0, False, True)
        loss, slope = torch.ops.kegfast.soft_target_forward(samples[:100], samples[100:200], 4.0, True)
        return exponent, gradient, loss, slope, functional.tucker_conv2d(*tensors, *geometry)

    with torch.no_grad():
        graph, outputs = captured(run)
        samples.copy_(torch.randn_like(samples))
        tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        for got, want in zip(outputs, run(), strict=True):
            assert torch.equal(got, want)


def test_two_streams_at_once():
    inputs = [diversity(256, 3072, torch.float32) for _ in range(8)]
    want = [torch.ops.kegfast.diversity_forward(*pair, 0, 0, True, True) for pair in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for i, pair in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            got.append(torch.ops.kegfast.diversity_forward(*pair, 0, 0, True, True))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    noises, samples = (t.detach().to("cuda:1") for t in diversity(256, 100, torch.float32))
    exponent, *_ = torch.ops.kegfast.diversity_forward(noises, samples, 0, 0, False, True)
    assert exponent.device == samples.device
    want = reference.diversity_exponent(noises.double(), samples.double(), "l1", "sqeuclidean")
    assert error(exponent, want) < 2e-6


def test_compile_without_a_graph_break():
    tensors, geometry = tucker2(CASES[0], torch.float32)
    compiled = torch.compile(functional.tucker_conv2d, fullgraph=True)
    assert error(compiled(*tensors, *geometry), exact_tucker2(tensors, geometry)) < 2e-6


@pytest.mark.parametrize("training", [False, True])
def test_autotune_takes_the_fastest(training):
    layer = kegfast.nn.TuckerConv2d(64, 64, 3, rank=(16, 16), padding=1).cuda().bfloat16()
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    with kegfast.backend("auto"), torch.set_grad_enabled(training):
        weights = layer.first.weight, layer.core.weight, layer.last.weight
        choice = x, *weights, ((1, 1), (1, 1), (1, 1)), training
        assert cuda.form(*choice) is None
        (times,) = kegfast.autotune(layer, x, training=training).values()
        assert set(times) <= set(cuda.FORMS)
        assert all(ms > 0 for ways in times.values() for ms in ways.values())
        assert cuda.form(*choice) == cuda.FORMS[cuda.fastest(times)]
        assert error(layer(x), exact_tucker2((x, *weights, layer.last.bias), choice[4])) < 8e-3
    assert cuda.cache_path().exists()


@pytest.mark.parametrize("keep", [False, True])
def test_tucker2_is_one_launch(keep):
    tensors, _ = tucker2(CASES[4], torch.bfloat16)
    tensors[2] = tensors[2].detach().contiguous(memory_format=torch.channels_last)
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        torch.ops.kegfast.tucker2_forward(*tensors, 1, 1, 1, 1, 1, 1, True, keep)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1
    assert "Tucker2Fused" in kernels[0]


SOFT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "classes"), [(1, 2), (300, 10), (64, 1000), (7, 1001), (3, 10000), (5, 100000)]
)
def test_soft_target(batch, classes, dtype):
    student, teacher = (3 * torch.randn(batch, classes, device="cuda").to(dtype) for _ in range(2))
    student.requires_grad_()
    loss = functional.soft_target(student, teacher, 4.0)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double(), teacher.double(), 4.0
    assert loss.dtype == gradient.dtype == dtype
    assert error(loss, reference.soft_target(*exact)) < SOFT_TOLERANCE[dtype]
    assert error(gradient, reference.soft_target_gradient(*exact)) < SOFT_TOLERANCE[dtype]


def test_opcheck_soft_target():
    student, teacher = (torch.randn(9, 33, device="cuda") for _ in range(2))
    arguments = (student.requires_grad_(), teacher, 2.0, True)
    torch.library.opcheck(torch.ops.kegfast.soft_target_forward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitized(dtype):
    """One call of each kernel, small enough for compute-sanitizer."""
    for batch in (20, 100, 300, 1100):
        noises, samples = diversity(batch, 9, dtype)
        for metric in range(4):
            for noise_metric in range(2):
                torch.ops.kegfast.diversity_forward(noises, samples, metric, noise_metric, True, True)
    for classes in (10, 1001, 13000):
        logits = [torch.randn(3, classes, device="cuda").to(dtype).requires_grad_() for _ in range(2)]
        functional.soft_target(*logits).backward()
    for case in (*CASES[:4], CASES[6]):
        for layout in (torch.channels_last, torch.contiguous_format):
            tensors, geometry = tucker2(case, dtype, layout)
            functional.tucker_conv2d(*tensors, *geometry).sum().backward()
            ints = [n for value in geometry for n in (value if isinstance(value, tuple) else (value, value))]
            torch.ops.kegfast.tucker2_as(*(t.detach() for t in tensors), *ints, True, 3)
    torch.cuda.synchronize()
