"""Diversity in numbers: every kernel, instruction set and dtype against the definition in float64."""

import itertools
import math

import pytest
import torch

import kegfast
from kegfast.functional import diversity_loss
from kegfast.ops import diversity, reference

_C = pytest.importorskip("kegfast._C")

ISAS = [isa for isa in ("baseline", "avx2", "avx512") if isa in kegfast.build_info()["isa_compiled"]]
PAIRS_OF_METRICS = list(itertools.product(diversity.METRICS, diversity.NOISE_METRICS))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        with kegfast.cpu_isa(request.param):
            yield request.param
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")


@pytest.fixture(params=["sort", "pairs"])
def l1_kernel(request):
    _C.force_l1_kernel(getattr(_C.L1Kernel, request.param))
    yield request.param
    _C.force_l1_kernel(_C.L1Kernel.automatic)


def native(noises, samples, metric="l1", noise_metric="sqeuclidean"):
    numbers = diversity.METRICS[metric], diversity.NOISE_METRICS[noise_metric]
    return torch.ops.kegfast.diversity_forward(noises, samples, *numbers, True, True)


def oracle(noises, samples, metric="l1", noise_metric="sqeuclidean"):
    leaves = noises.double().requires_grad_(), samples.double().requires_grad_()
    exponent = reference.diversity_exponent(*leaves, metric, noise_metric)
    return exponent.detach(), *torch.autograd.grad(exponent, leaves)


def off(got, exact):
    """The largest error as a share of the largest entry."""
    return ((got - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def check(noises, samples, metric="l1", noise_metric="sqeuclidean", value=1e-6, gradient=1e-6):
    for got, exact, bound in zip(
        native(noises, samples, metric, noise_metric),
        oracle(noises, samples, metric, noise_metric),
        (value, gradient, gradient),
        strict=True,
    ):
        assert got.shape == exact.shape
        assert off(got, exact) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("metric", "noise_metric"), PAIRS_OF_METRICS)
@pytest.mark.parametrize(
    ("batch", "features", "width"),
    [(1, 1, 1), (2, 5, 3), (7, 33, 10), (64, 16, 1), (131, 17, 14), (90, 8, 20), (80, 3, 150)],
)
def test_matches_the_definition(isa, seeded, dtype, metric, noise_metric, batch, features, width):
    noises, samples = torch.randn(batch, width, dtype=dtype), torch.randn(batch, features, dtype=dtype)
    # The cosine's gradient is the small difference that is left of the samples' own direction.
    bound = 1e-12 if dtype is torch.float64 else 2e-5 if metric == "cosine" else 1e-6
    check(noises, samples, metric, noise_metric, min(bound, 1e-6), bound)


@pytest.mark.parametrize("batch", [1, 2, 3, 15, 16, 17, 32, 33, 100, 255, 257, 520])
def test_each_l1_kernel_at_any_batch(isa, seeded, l1_kernel, batch):
    check(torch.randn(batch, 10), torch.randn(batch, 3))


@pytest.mark.parametrize("width", [1, 13, 14, 15, 30, 31, 62, 63, 126])
def test_each_l1_kernel_at_any_noise_width(isa, seeded, l1_kernel, width):
    check(torch.randn(40, width), torch.randn(40, 20))


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 40])
def test_low_rank_at_any_noise_width(isa, seeded, width):
    check(torch.randn(70, width), torch.randn(70, 20), "sqeuclidean")


def test_gradient_error_at_full_size(isa, seeded):
    noises, samples = torch.randn(256, 10), torch.randn(256, 48)
    got, exact = native(noises, samples)[2], oracle(noises, samples)[2]
    assert off(got, exact) <= 1e-6


@pytest.mark.parametrize("values", [2, 7, 40])
def test_ties_count_for_nothing(isa, seeded, l1_kernel, values):
    check(torch.randn(100, 10), torch.randint(values, (100, 20)).float())


def test_half_of_the_entries_zero(isa, seeded, l1_kernel):
    check(torch.randn(100, 10), torch.randn(100, 20).relu())


def test_neighboring_floats_are_not_ties(isa, seeded, l1_kernel):
    samples = torch.ones(100, 20) + torch.randint(40, (100, 20)) * 2.0**-23
    samples[0] = -1000  # one outlier squeezes all others into a few fixed-point numbers
    check(torch.randn(100, 10), samples)


def test_outlier_beyond_fixed_point(isa, seeded, l1_kernel):
    samples = torch.randn(150, 20)
    samples[3], samples[9] = 1e12, -1e20
    check(torch.randn(150, 10), samples)


@pytest.mark.parametrize("scale", [1e-43, 1e-38, 3e38])
def test_l1_at_the_ends_of_the_range(isa, seeded, l1_kernel, scale):
    noises, samples = torch.randn(80, 4), ((torch.rand(80, 20) * 2 - 1).double() * scale).float()
    exponent, _, gradient = native(noises, samples)
    exact = oracle(noises.double(), samples.double())
    assert off(exponent / scale, exact[0] / scale) <= 1e-6
    assert off(gradient, exact[2]) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_l1_is_homogeneous_to_the_ends_of_the_range(isa, seeded, l1_kernel, scale):
    noises, samples = torch.randn(80, 4), torch.randn(80, 20)
    exact = oracle(noises, (samples * scale).double())
    got = native(noises, samples * scale)
    for found, wanted in zip(got, exact, strict=True):
        assert off(found, wanted) <= 1e-6


def test_offset_does_not_cancel(isa, seeded):
    noises, samples = torch.randn(256, 10), 100 + 0.01 * torch.randn(256, 20)
    got, exact = native(noises, samples, "sqeuclidean"), oracle(noises, samples, "sqeuclidean")
    assert off(got[2], exact[2]) <= 3e-7
    assert off(got[0], exact[0]) <= 1e-6
    check(noises, samples, "l1")
    check(noises, samples, "euclidean")


def test_noise_offset_does_not_cancel(isa, seeded):
    check(100 + 0.01 * torch.randn(100, 10), torch.randn(100, 20))


@pytest.mark.parametrize(("metric", "noise_metric"), PAIRS_OF_METRICS)
def test_coincident_points_have_gradient_zero(isa, metric, noise_metric):
    samples = torch.randn(1, 20).expand(90, 20)
    exponent, noise_gradient, gradient = native(torch.randn(90, 4), samples, metric, noise_metric)
    assert abs(exponent) <= 1e-7
    assert gradient.abs().max() <= (1e-6 if metric == "cosine" else 0)
    assert torch.isfinite(noise_gradient).all()
    _, noise_gradient, gradient = native(torch.ones(90, 4), torch.randn(90, 20), metric, noise_metric)
    assert not gradient.any()
    assert not noise_gradient.any()


@pytest.mark.parametrize("metric", ["l1", "sqeuclidean", "euclidean"])
def test_constant_column_is_exactly_zero(isa, seeded, metric):
    samples = torch.randn(90, 20)
    samples[:, 7] = 0.3
    assert not native(torch.randn(90, 4), samples, metric)[2][:, 7].any()


def test_zero_rows_are_at_cosine_distance_one(isa, seeded):
    samples = torch.randn(90, 20)
    samples[3] = samples[50] = 0
    check(torch.randn(90, 4), samples, "cosine", gradient=2e-5)
    check(torch.randn(90, 4), samples, "cosine", "euclidean", gradient=2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["noises", "samples"])
@pytest.mark.parametrize(("metric", "noise_metric"), PAIRS_OF_METRICS)
@pytest.mark.parametrize("batch", [20, 90])
def test_not_finite_makes_everything_nan(isa, seeded, bad, where, metric, noise_metric, batch):
    inputs = {"noises": torch.randn(batch, 4), "samples": torch.randn(batch, 37)}
    inputs[where][5, 3] = bad
    assert all(out.isnan().all() for out in native(**inputs, metric=metric, noise_metric=noise_metric))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("log", [False, True])
def test_not_finite_is_nan_on_every_path(seeded, backend, log):
    samples = torch.randn(20, 5)
    samples[2, 2] = math.inf
    samples.requires_grad_()
    with kegfast.backend(backend):
        loss = diversity_loss(torch.randn(20, 4), samples, log=log)
    loss.backward()
    assert loss.isnan()
    assert samples.grad.isnan().all()


@pytest.mark.parametrize("metric", diversity.METRICS)
def test_instruction_sets_and_threads_agree(seeded, metric):
    noises, samples = torch.randn(150, 10), torch.randn(150, 700)
    values = {}
    threads = torch.get_num_threads()
    for name in ISAS:
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                with kegfast.cpu_isa(name):
                    first, again = (native(noises, samples, metric) for _ in range(2))
            except ValueError:
                continue
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            values[name, count] = first
    one = next(iter(values.values()))
    for other in values.values():
        assert off(other[0], one[0]) <= 1e-6
        assert off(other[2], one[2]) <= (2e-5 if metric == "cosine" else 2e-6)


def test_threads_do_not_change_the_samples_gradient(seeded):
    noises, samples = torch.randn(150, 10), torch.randn(150, 700)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(native(noises, samples))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])


def test_float16_gradient_does_not_vanish(seeded):
    noises, samples = torch.randn(64, 10).half(), torch.randn(64, 3072).half().requires_grad_()
    loss = diversity_loss(noises, samples)
    (loss * 65536).backward()  # as a gradient scaler does
    exact = oracle(noises, samples.detach())
    assert loss.dtype is torch.float32
    assert samples.grad.dtype is torch.float16
    assert off(samples.grad.double() / 65536, exact[2] * exact[0].exp()) <= 1e-3


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "expanded", "row"])
def test_layouts(isa, seeded, layout):
    noises = torch.randn(90, 10)
    samples = {
        "channels_last": lambda: torch.randn(90, 3, 4, 4).to(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(90, 40)[:, ::2],
        "transposed": lambda: torch.randn(20, 90).T,
        "expanded": lambda: torch.randn(90, 1).expand(90, 20),
        "row": lambda: torch.randn(90, 64)[:, 3:40],
    }[layout]()
    leaf = samples.detach().requires_grad_()
    diversity_loss(noises.T.contiguous().T, leaf, log=True).backward()
    exact = oracle(noises, samples.flatten(1))[2]
    assert off(leaf.grad.flatten(1), exact) <= 1e-6
