"""Every CUDA kernel on the fiber emulator: values, gradients, both fiber orders. Needs g++, no GPU."""

import subprocess

import pytest
import torch
from cuda_emulator import (
    A100_SHARED,
    DTYPES,
    H200_SHARED,
    METRICS,
    NOISE_METRICS,
    ORDERS,
    ROOT,
    View,
    available,
    compile_emulator,
    emulator,
    pointer,
)

from kegfast import reference

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


# tucker2: (N, C, H, W), ranks, K, kernel, stride, padding, dilation
TUCKER2 = {
    "plain": ((2, 16, 9, 9), (8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "lenet": ((1, 3, 14, 14), (3, 8), 6, (5, 5), (1, 1), (0, 0), (1, 1)),
    "odd ranks, stride 2": ((2, 20, 7, 11), (10, 25), 50, (3, 3), (2, 2), (1, 1), (1, 1)),
    "uneven": ((1, 32, 12, 10), (20, 70), 40, (3, 1), (1, 2), (2, 0), (2, 1)),
    "one pixel": ((3, 8, 1, 1), (4, 4), 8, (1, 1), (1, 1), (0, 0), (1, 1)),
}
WIDE = ((1, 72, 5, 6), (130, 100), 136, (3, 3), (1, 1), (1, 1), (1, 1))
# Rounding of x, t1, t2 and y to the type; float32 by three TF32 products has float32's own accuracy.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4, "tf32": 1e-3}


def tucker2_case(case, dtype, layout=torch.channels_last, seed=0):
    shape, (r1, r2), k, kernel, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, fan=1):
        return (torch.randn(size, generator=generator) / fan**0.5).to(dtype)

    x = normal(*shape).contiguous(memory_format=layout)
    first, last = normal(r1, shape[1], 1, 1, fan=shape[1]), normal(k, r2, 1, 1, fan=r2)
    core = normal(r2, r1, *kernel, fan=r1 * kernel[0] * kernel[1])
    return (x, first, core, last, normal(k)), (stride, padding, dilation)


def tucker2_definition(tensors, geometry, activation="relu"):
    return reference.tucker_conv2d(*(t.double() for t in tensors), *geometry, activation)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["fused", "stages"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TUCKER2.values(), ids=TUCKER2)
def test_tucker2(device, case, dtype, layout, form, order):
    tensors, geometry = tucker2_case(case, dtype, layout)
    y, *_, call = device.tucker2(*tensors, *geometry, True, order, form=form)
    assert call.launches == (1 if form == "fused" else 3)
    assert call.workspace == 0 or form == "stages"
    assert error(y, tucker2_definition(tensors, geometry)) < TOLERANCE[dtype]


def in_vectors(tensors):
    """The same factors, the core's inputs together."""
    x, first, core, last, bias = tensors
    return x, first, core.contiguous(memory_format=torch.channels_last), last, bias


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tucker2_is_one_launch_in_any_layout_of_the_core(device, dtype, keep, order):
    tensors, geometry = tucker2_case(TUCKER2["plain"], dtype)
    plain, together = (
        device.tucker2(*given, *geometry, True, order, keep=keep) for given in (tensors, in_vectors(tensors))
    )
    for *values, call in (plain, together):
        assert (call.launches, call.workspace) == (1, 0)
        assert all((value is not None) == (keep or i == 0) for i, value in enumerate(values))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain[:3], together[:3], strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_tucker2_packs_a_plain_core_for_many_blocks(device, keep):
    case = ((40, 8, 4, 4), (24, 20), 12, (3, 3), (1, 1), (1, 1), (1, 1))
    tensors, geometry = tucker2_case(case, torch.bfloat16)
    *packed, call = device.tucker2(*tensors, *geometry, True, "ascending", keep=keep, multiprocessors=1)
    assert call.launches == 2
    assert 0 < call.workspace < 2 * 2 * sum(w.numel() for w in tensors[1:4]) + 1024
    *gathered, call = device.tucker2(*tensors, *geometry, True, "ascending", keep=keep)
    assert call.launches == 1
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(packed, gathered, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["fused", "stages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tucker2_above_rank_64(device, dtype, form, order):
    tensors, geometry = tucker2_case(WIDE, dtype)
    y, *_ = device.tucker2(*tensors, *geometry, True, order, form=form)
    assert error(y, tucker2_definition(tensors, geometry)) < TOLERANCE[dtype]


def test_tucker2_tf32_is_one_product(device):
    tensors, geometry = tucker2_case(TUCKER2["plain"], torch.float32)
    want = tucker2_definition(tensors, geometry)
    three = device.tucker2(*tensors, *geometry, True, "ascending")[0]
    one = device.tucker2(*tensors, *geometry, True, "ascending", split=False)[0]
    assert error(three, want) < TOLERANCE[torch.float32] < error(one, want) < TOLERANCE["tf32"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["fused", "stages"])
@pytest.mark.parametrize("case", TUCKER2.values(), ids=TUCKER2)
def test_tucker2_keeps_the_intermediates(device, case, form, order):
    tensors, geometry = tucker2_case(case, torch.float32, torch.contiguous_format)
    y, t1, t2, call = device.tucker2(*tensors, *geometry, False, order, keep=True, form=form)
    assert call.launches == (1 if form == "fused" and geometry[0] == (1, 1) else 3)
    x, first, core = (t.double() for t in tensors[:3])
    (ph, pw), want1 = geometry[1], torch.nn.functional.conv2d(x, first)
    want2 = torch.nn.functional.conv2d(want1, core, None, *geometry)
    assert error(t1.permute(0, 3, 1, 2), torch.nn.functional.pad(want1, (pw, pw, ph, ph))) < 1e-6
    assert error(t2.permute(0, 3, 1, 2), want2) < 1e-6
    assert error(y, tucker2_definition(tensors, geometry, None)) < 1e-6


@pytest.mark.parametrize("form", ["fused", "stages"])
@pytest.mark.parametrize("case", ["plain", "lenet", "one pixel"])
def test_tucker2_gradient_is_the_operator_on_transposed_factors(device, case, form):
    tensors, (stride, padding, dilation) = tucker2_case(TUCKER2[case], torch.float32)
    x = tensors[0].double().requires_grad_()
    y = reference.tucker_conv2d(x, *(t.double() for t in tensors[1:]), stride, padding, dilation, None)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad.double())
    first, core, last = (View.transposed(w) for w in (tensors[3], tensors[2], tensors[1]))
    border = [d * (k - 1) - p for k, p, d in zip(core.shape[2:], padding, dilation, strict=True)]
    dx, *_ = device.tucker2(
        grad, first, core, last, None, stride, border, dilation, False, "ascending", form=form
    )
    assert error(dx, x.grad) < 1e-6


def test_tucker2_reads_any_strides(device):
    tensors, geometry = tucker2_case(TUCKER2["plain"], torch.bfloat16)
    x = torch.randn(2, 9, 9, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    for view in (
        x[..., 3:35:2].permute(0, 3, 1, 2),
        x[..., 8:24].permute(0, 3, 1, 2),
        x[..., 8:24].transpose(1, 3),
    ):
        y, *_ = device.tucker2(view, *tensors[1:], *geometry, True, "ascending")
        want = tucker2_definition((view, *tensors[1:]), geometry)
        assert error(y, want) < TOLERANCE[torch.bfloat16]


def test_tucker2_nan_stays_where_its_window_is(device):
    tensors, geometry = tucker2_case(TUCKER2["plain"], torch.float32)
    tensors[0][1, 3, 0, 0] = float("nan")
    y, *_ = device.tucker2(*tensors, *geometry, True, "ascending")
    assert torch.equal(y.isnan(), tucker2_definition(tensors, geometry).isnan())


def test_tucker2_falls_back_to_stages_without_shared_memory(device):
    tensors, geometry = tucker2_case(WIDE, torch.float32)
    y, *_, call = device.tucker2(*tensors, *geometry, True, "ascending", shared=84 * 1024)
    assert call.launches >= 3
    assert error(y, tucker2_definition(tensors, geometry)) < 1e-6


def plan(device, channels, size, share, batch, core_format=torch.channels_last, **options):
    """The call that ResNet's C@HxH with ranks C / share would make, in bfloat16."""
    rank, dtype = channels // share, torch.bfloat16
    options = {"form": "automatic", "dry": True} | options
    x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    core = torch.empty(rank, rank, 3, 3, dtype=dtype).to(memory_format=core_format)
    first, last = (torch.empty(*shape, 1, 1, dtype=dtype) for shape in ((rank, channels), (channels, rank)))
    one = (1, 1)
    *_, call = device.tucker2(x, first, core, last, None, one, one, one, True, "ascending", **options)
    return call


# Where multiply-adds decide, stages waste none on the halo.
COMPUTE_BOUND = {(256, 2), (512, 2), (512, 4)}


@pytest.mark.parametrize("share", [2, 4, 8])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_tucker2_plan_of_resnet(device, channels, size, share):
    call = plan(device, channels, size, share, 128)
    fused = (channels, share) not in COMPUTE_BOUND
    assert call.launches == (1 if fused else 3)
    assert call.blocks >= 128 * size * size / 64
    assert call.most_shared <= (H200_SHARED - 3072) / 2  # two blocks a multiprocessor


def test_tucker2_plan_splits_few_images_of_wide_layers(device):
    assert plan(device, 512, 7, 2, 1).launches == 3
    assert plan(device, 64, 56, 4, 1).launches == 1


def test_tucker2_plan_packs_a_plain_core_only_where_it_is_read_often(device):
    for batch, launches in ((1, 1), (128, 2)):
        assert plan(device, 64, 56, 4, batch, torch.contiguous_format).launches == launches


@pytest.mark.parametrize("share", [2, 4, 8])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_tucker2_trains_in_one_launch(device, channels, size, share):
    """Keeping t1 and t2 for the gradients costs a store, not another form."""
    call = plan(device, channels, size, share, 128, keep=True, form="fused")
    assert (call.launches, call.workspace) == (1, 0)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes", [10, 300])
def test_soft_target_not_finite(device, classes, bad):
    for which in range(2):
        pair = logits(3, classes, torch.float32)
        pair[which][1, classes // 2] = bad
        loss, gradient = device.soft_target(*pair, 4.0, "ascending")
        assert loss.isnan()
        assert gradient[1].isnan().any()


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
