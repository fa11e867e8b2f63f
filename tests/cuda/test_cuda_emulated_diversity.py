"""diversity's CUDA kernels on the fiber emulator: values, gradients, both fiber orders, the plan."""

import pytest
import torch
from cuda_emulator import A100_SHARED, DTYPES, H200_SHARED, METRICS, NOISE_METRICS, ORDERS, available, error

from kegfast.ops import reference

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


def definition(noises, samples, metric, noise_metric):
    noises, samples = noises.double().requires_grad_(), samples.double().requires_grad_()
    exponent = reference.diversity_exponent(noises, samples, metric, noise_metric)
    exponent.backward()
    return exponent.detach(), noises.grad, samples.grad


def draw(batch, noise_size, features, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(batch, noise_size, generator=generator)
    return noises, (torch.randn(batch, features, generator=generator) + 3).to(dtype)


# Batches for the pair kernel and for the sort, each with a partial last tile.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "noise_size", "features"), [(5, 1, 3), (33, 10, 40), (70, 3, 19)])
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
@pytest.mark.parametrize("metric", METRICS)
def test_diversity(device, metric, noise_metric, batch, noise_size, features, dtype, order):
    noises, samples = draw(batch, noise_size, features, dtype)
    got = device.diversity(noises, samples, metric, noise_metric, order)
    for value, want in zip(got, definition(noises, samples, metric, noise_metric), strict=True):
        assert error(value, want) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
@pytest.mark.parametrize("metric", METRICS)
def test_diversity_in_panels_and_without_room_for_the_samples(device, metric, noise_metric, order):
    """Pairs 32 rows at a time; 16 KB of shared memory, in which no block's samples fit."""
    noises, samples = draw(75, 3, 34, torch.float32)
    want = definition(noises, samples, metric, noise_metric)
    options = (
        {"panel": 1} if metric == "l1" and noise_metric == "sqeuclidean" else {"panel": 1, "shared": 16384}
    )
    got = device.diversity(noises, samples, metric, noise_metric, order, **options)
    for value, wanted in zip(got, want, strict=True):
        assert error(value, wanted) < 1e-6


@pytest.mark.parametrize("noise_grad", [False, True])
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
@pytest.mark.parametrize("metric", METRICS)
def test_diversity_workspace_stays_small_at_any_batch(device, metric, noise_metric, noise_grad):
    """Whatever batch fits itself: never B x B, and no copy of the samples."""
    for batch, features in ((1024, 3072), (4096, 3072), (16384, 3072), (131072, 256), (1 << 20, 16)):
        call = device.diversity_plan(batch, features, metric, noise_metric, noise_grad=noise_grad)
        assert call.workspace < 700e6
        sorts = metric == "l1" and noise_metric == "sqeuclidean"
        if not sorts and batch <= 4096:
            assert call.workspace < 3 * 64 * 2**20 + 2**22
    if noise_metric == "sqeuclidean" and not noise_grad:
        assert device.diversity_plan(4096, 3072, metric, noise_metric, noise_grad=False).workspace < (
            210e6 if metric == "euclidean" else 4e6
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["l1", "sqeuclidean"])
def test_diversity_with_a_wide_noise(device, metric, dtype, order):
    noises, samples = draw(257, 14, 24, dtype)
    got = device.diversity(noises, samples, metric, "sqeuclidean", order)
    for value, want in zip(got, definition(noises, samples, metric, "sqeuclidean"), strict=True):
        assert error(value, want) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_diversity_l1_batch_of_1100(device, order):
    noises, samples = draw(1100, 10, 3, torch.float32)
    exponent, _, gradient = device.diversity(noises, samples, "l1", "sqeuclidean", order, noise_grad=False)
    want, _, want_gradient = definition(noises, samples, "l1", "sqeuclidean")
    assert error(exponent, want) < 1e-6
    assert error(gradient, want_gradient) < 1e-6


@pytest.mark.parametrize(("dtype", "order"), [(torch.float32, "ascending"), (torch.bfloat16, "descending")])
def test_diversity_l1_beyond_one_block(device, dtype, order):
    noises, samples = draw(
        8300, 3, 2, dtype
    )  # three tiles: the last one almost empty, and an odd run to merge
    samples[::3, 1] = 0.5
    exponent, _, gradient = device.diversity(noises, samples, "l1", "sqeuclidean", order, noise_grad=False)
    z, x = noises.double(), samples.double()
    want, total = torch.empty_like(x), 0.0
    for rows in torch.arange(8300).split(830):  # all pairs at once would be half a gigabyte
        weights = torch.cdist(z[rows], z).square() / 3
        for feature in range(2):
            difference = x[rows, None, feature] - x[None, :, feature]
            want[rows, feature] = -2 * (weights * difference.sign()).sum(1) / (8300**2 * 2)
            total -= (weights * difference.abs()).sum() / (8300**2 * 2)
    assert error(gradient, want) < 2e-6
    assert error(exponent, total) < 1e-6


def test_diversity_l1_beyond_one_block_not_finite(device):
    noises, samples = draw(4100, 3, 2, torch.float32)
    samples[4099, 1] = float("inf")
    for value in device.diversity(noises, samples, "l1", "sqeuclidean", "ascending", noise_grad=False)[::2]:
        assert value.isnan().all()


# Batches of the sort with 1, 4 and 16 warps a feature; the merged sort has its own test.
TEAMS = {"1 warp": 200, "4 warps": 300, "16 warps": 1100}


@pytest.mark.parametrize("order", [*ORDERS, 0, 1])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", TEAMS.values(), ids=TEAMS)
def test_diversity_where_some_features_have_ties_and_others_none(device, batch, metric, order):
    """Teams of a block then go different ways: none may wait for another."""
    features = 4 if batch > 1000 else 16
    noises, samples = draw(batch, 3, features, torch.float32)
    samples[: batch // 2, ::3] = 0.5
    exponent, _, gradient = device.diversity(noises, samples, metric, "sqeuclidean", order, noise_grad=False)
    want, _, want_gradient = definition(noises, samples, metric, "sqeuclidean")
    assert error(exponent, want) < 1e-6
    assert error(gradient, want_gradient) < 1e-6


def alike(batch, each, seed=0):
    """Floats from 1 on of which `each` at a time share all but their last 12 bits, in any order."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.cat([torch.randperm(each, generator=generator) for _ in range(-(-batch // each))])[:batch]
    spacing = 3 if batch > 256 else 1  # so that they differ in the last 8, 10 or 12 bits alone
    bits = 0x3F800000 + torch.arange(batch) // each * 4096 + low * spacing
    return bits[torch.randperm(batch, generator=generator)].int().view(torch.float32)


@pytest.mark.parametrize("order", [*ORDERS, 0, 1])
@pytest.mark.parametrize("batch", TEAMS.values(), ids=TEAMS)
def test_diversity_where_values_differ_in_their_last_bits(device, batch, order):
    """Short keys do not see them: few at a time are put right, all of them are sorted by long keys."""
    noises, samples = draw(batch, 3, 4 if batch > 1000 else 8, torch.float32)
    samples[:, 0], samples[:, 1] = alike(batch, 3), alike(batch, batch)
    samples[: batch // 2, 1] = samples[0, 1]  # beside ties
    samples[:, 2] = -alike(batch, 7)
    exponent, _, gradient = device.diversity(noises, samples, "l1", "sqeuclidean", order, noise_grad=False)
    want, _, want_gradient = definition(noises, samples, "l1", "sqeuclidean")
    assert error(exponent, want) < 1e-6
    for got, wanted in zip(gradient.T, want_gradient.T, strict=True):
        assert error(got, wanted) < 1e-6


@pytest.mark.parametrize("order", [*ORDERS, 0])
@pytest.mark.parametrize("noise_metric", NOISE_METRICS)
def test_diversity_cosine_of_many_rows_of_zeros(device, noise_metric, order):
    noises, samples = draw(75, 3, 6, torch.float32)
    samples[::2] = 0
    got = device.diversity(noises, samples, "cosine", noise_metric, order, panel=1)
    want = definition(noises, samples, "cosine", noise_metric)
    assert error(got[0], want[0]) < 1e-6
    assert error(got[1], want[1]) < 1e-6


@pytest.mark.parametrize("metric", ["l1", "sqeuclidean", "cosine"])
def test_diversity_with_noises_too_wide_for_their_moments(device, metric):
    """1,100 columns of the noise table do not fit into 100 KB, nor their means into 1,024 places."""
    noises, samples = draw(70, 1100, 9, torch.float32)
    got = device.diversity(noises, samples, metric, "sqeuclidean", "ascending", shared=100 * 1024)
    for value, want in zip(got, definition(noises, samples, metric, "sqeuclidean"), strict=True):
        assert error(value, want) < 1e-6


@pytest.mark.parametrize("noise_size", [10, 1700, 30000])
@pytest.mark.parametrize("metric", METRICS)
def test_diversity_asks_for_no_more_shared_memory_than_there_is(device, metric, noise_size):
    for shared in (100 * 1024, A100_SHARED, H200_SHARED):  # the emulator refuses what is more
        for batch in (64, 256, 1024, 4096, 5000):
            device.diversity_plan(batch, 64, metric, "sqeuclidean", noise_size=noise_size, shared=shared)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("metric", METRICS)
def test_diversity_is_the_same_in_any_order(device, metric, seed):
    noises, samples = draw(300 if metric == "l1" else 40, 3, 6, torch.float32)
    samples[::5, 1] = 2
    want = device.diversity(noises, samples, metric, "sqeuclidean", "ascending")
    got = device.diversity(noises, samples, metric, "sqeuclidean", seed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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
