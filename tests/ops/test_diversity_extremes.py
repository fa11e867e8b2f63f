"""Diversity of samples near the ends of the range, or nearly alike, against 80-bit arithmetic."""

import numpy as np
import pytest
import torch

import kegfast
from kegfast.functional import diversity_loss
from kegfast.ops import diversity

pytest.importorskip("kegfast._C")
pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="this machine's long double is no wider than float64"
)
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    try:
        with kegfast.cpu_isa(request.param):
            yield
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")


def exact(noises, samples, metric):
    """Exponent and its gradient in the samples, (B, nz) and (B, D), in long double."""
    z, x = (t.numpy().astype(np.longdouble) for t in (noises, samples))
    w = ((z[:, None] - z[None]) ** 2).mean(2)
    norm = np.sqrt((x**2).sum(1, keepdims=True)) if metric == "cosine" else np.ones((len(x), 1))
    y = x / norm
    delta = y[:, None] - y[None]
    square = (delta**2).sum(2)
    d = square / 2 if metric == "cosine" else np.sqrt(square)
    slope = w if metric == "cosine" else w / np.where(d > 0, d, 1)
    gradient = -2 * (slope[:, :, None] * delta).sum(1) / len(x) ** 2
    if metric == "cosine":
        gradient = (gradient - (gradient * y).sum(1, keepdims=True) * y) / norm
    return -(w * d).mean(), gradient


def native(noises, samples, metric):
    exponent, _, gradient = torch.ops.kegfast.diversity_forward(
        noises, samples, diversity.METRICS[metric], 0, True, True
    )
    assert gradient.isfinite().all()
    return exponent.item(), gradient.numpy().astype(np.longdouble)


def made(scale, dtype, batch=40, features=700):  # above the break-even of two threads
    rng = torch.Generator().manual_seed(0)
    noises, samples = (torch.randn(batch, n, generator=rng, dtype=torch.float64) for n in (4, features))
    return noises.to(dtype), (samples * scale).to(dtype)


SCALES = [(torch.float32, s) for s in (1e-44, 1e-42, 1e-38, 1e37)]
SCALES += [(torch.float64, s) for s in (1e-320, 1e-310, 1e-300, 1e305)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_at_the_ends_of_the_range(isa, threads, dtype, scale, metric):
    noises, samples = made(scale, dtype)
    value, gradient = native(noises, samples, metric)
    wanted, slope = exact(noises, samples, metric)
    roundoff = torch.finfo(dtype).eps
    # a value that is itself subnormal has few digits
    assert abs(value - wanted) <= 30 * roundoff * abs(wanted) + 4e-324
    held = np.clip(slope, -torch.finfo(dtype).max, torch.finfo(dtype).max)
    bound = 60 * roundoff * abs(slope).max() + torch.finfo(dtype).smallest_normal * roundoff
    assert abs(gradient - held).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_tiny_samples_among_others(isa, threads, dtype, metric):
    noises, samples = made(1, dtype)
    least = torch.finfo(dtype).tiny
    samples[3], samples[4, ::2] = samples[3] * least / 8, samples[5, ::2] * least / 2**10
    samples[7] *= least * 1e8
    value, gradient = native(noises, samples, metric)
    wanted, slope = exact(noises, samples, metric)
    assert abs(value - wanted) <= 30 * torch.finfo(dtype).eps * abs(wanted)
    rest = [i for i in range(40) if i not in (3, 4, 7)]  # these are nearer to each other than is told apart
    assert abs(gradient - slope)[rest].max() <= 200 * torch.finfo(dtype).eps * abs(slope[rest]).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6])
def test_cosine_of_samples_nearly_alike_is_off_by_the_rounding_of_unlike_ones(isa, threads, dtype, spread):
    noises, samples = made(1, dtype)
    samples = samples[:1] + spread * samples
    value, gradient = native(noises, samples, "cosine")
    wanted, slope = exact(noises, samples, "cosine")
    roundoff = torch.finfo(dtype).eps
    assert abs(value - wanted) <= 4 * roundoff * max(spread, 4 * roundoff)
    steepness = torch.cdist(noises, noises).square().mean() / 4 / len(samples) / samples.norm(dim=1).min()
    assert abs(gradient - slope).max() <= 2 * roundoff * steepness.item()


LAYOUTS = {
    "images expanded": lambda: torch.randn(1, 3, 4, 5).expand(6, 3, 4, 5),
    "channels expanded": lambda: torch.randn(6, 1, 4, 5).expand(6, 3, 4, 5),
    "all expanded": lambda: torch.randn(1, 1, 1, 1).expand(6, 3, 4, 5),
    "transposed": lambda: torch.randn(3, 6, 5, 4).transpose(0, 1).transpose(2, 3),
    "reversed": lambda: torch.randn(5, 4, 3, 6).permute(3, 2, 1, 0),
    "steps": lambda: torch.randn(6, 6, 4, 10)[:, ::2, :, ::2],
}


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1, 1, 1, 2])])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noises_and_samples_of_any_strides(seeded, layout, dtype, backend, create_graph, labels):
    samples, noises = LAYOUTS[layout]().to(dtype), LAYOUTS[layout]().flip(1).to(dtype)

    def gradients(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = diversity_loss(*leaves, labels=labels)
        return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    with kegfast.backend(backend):
        found = gradients(noises, samples), gradients(noises.contiguous(), samples.contiguous())
    for strided, dense in zip(*found, strict=True):
        assert strided.shape == (6, 3, 4, 5)
        assert torch.equal(strided, dense)
