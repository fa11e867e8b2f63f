"""tucker2's CUDA kernels on the fiber emulator: values, gradients, both fiber orders, the plan."""

import pytest
import torch
from cuda_emulator import DTYPES, H200_SHARED, ORDERS, View, available, error

from kegfast.ops import reference

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


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


@pytest.mark.parametrize("form", ["fused", "stages"])
@pytest.mark.parametrize(
    ("dtype", "split"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("case", ["lenet", "odd ranks, stride 2", "uneven"])
def test_tucker2_keeps_infinities(device, case, dtype, form, split):
    """Ranks of no whole steps: infinity times the padding is no number, and must not be looked at."""
    tensors, geometry = tucker2_case(TUCKER2[case], dtype)
    tensors[0][0, 1, 2, 4] = float("inf")
    tensors = (tensors[0], *(w.abs() for w in tensors[1:]))  # else infinities meet of both signs
    y, *_ = device.tucker2(*tensors, *geometry, False, "ascending", form=form, split=split)
    want = tucker2_definition(tensors, geometry, None)
    assert want.isinf().any()
    assert torch.equal(want.isinf(), y.isinf())
    assert error(y[y.isfinite()], want[y.isfinite()]) < TOLERANCE[dtype if split else "tf32"]


@pytest.mark.parametrize("form", ["fused", "stages"])
def test_tucker2_is_as_exact_as_float32_over_a_long_sum(device, form):
    """ResNet's 512 channels: what a tensor core's accumulator drops adds up."""
    case = ((1, 512, 3, 3), (128, 128), 16, (3, 3), (1, 1), (1, 1), (1, 1))
    tensors, geometry = tucker2_case(case, torch.float32)
    y, *_ = device.tucker2(*tensors, *geometry, False, "ascending", form=form)
    want = tucker2_definition(tensors, geometry, None)
    assert error(y, want) < 5e-7
    assert error(y, want) < 1.5 * error(reference.tucker_conv2d(*tensors, *geometry, None), want)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("form", ["fused", "stages"])
def test_tucker2_is_the_same_in_any_order(device, form, seed):
    case = ((2, 8, 5, 9), (3, 5), 6, (3, 3), (1, 1), (1, 1), (1, 1))
    tensors, geometry = tucker2_case(case, torch.bfloat16)
    want = device.tucker2(*tensors, *geometry, True, "ascending", form=form, keep=True)[:3]
    got = device.tucker2(*tensors, *geometry, True, seed, form=form, keep=True)[:3]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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


# ---- the persistent form

PERSISTENT = TUCKER2 | {
    "two chunks": ((2, 104, 9, 7), (16, 24), 72, (3, 3), (1, 1), (1, 1), (1, 1)),
    "three chunks": ((1, 136, 5, 20), (40, 33), 136, (3, 3), (1, 1), (1, 1), (1, 1)),
    "rank 64": ((1, 64, 9, 9), (64, 64), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride and dilation": ((2, 16, 13, 17), (16, 8), 24, (3, 3), (2, 1), (2, 2), (1, 2)),
}
PERSISTENT = {
    name: case
    for name, case in PERSISTENT.items()
    if case[0][1] % 8 == 0 and case[0][2] > 1 and case[2] % 8 == 0 and max(case[1]) <= 64
}


@pytest.mark.parametrize("order", [*ORDERS, 0, 1, 2])
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PERSISTENT.values(), ids=PERSISTENT)
def test_tucker2_persistent(device, case, dtype, multiprocessors, order):
    """One multiprocessor's blocks take several tiles each."""
    tensors, geometry = tucker2_case(case, dtype)
    options = {"form": "persistent", "multiprocessors": multiprocessors}
    y, *_, call = device.tucker2(*tensors, *geometry, True, order, **options)
    assert call.persistent
    assert (call.launches, call.workspace) == (1, 0)
    assert error(y, tucker2_definition(tensors, geometry)) < TOLERANCE[dtype]
    packed, *_ = device.tucker2(*in_vectors(tensors), *geometry, True, order, **options)
    assert torch.equal(packed, y)


@pytest.mark.parametrize("seed", range(24))
def test_tucker2_persistent_is_the_same_in_any_order(device, seed):
    tensors, geometry = tucker2_case(PERSISTENT["two chunks"], torch.bfloat16)
    options = {"form": "persistent", "multiprocessors": 1}
    want = device.tucker2(*tensors, *geometry, True, "ascending", **options)[0]
    assert torch.equal(device.tucker2(*tensors, *geometry, True, seed, **options)[0], want)


@pytest.mark.parametrize("case", ["three chunks", "stride and dilation"])
def test_tucker2_persistent_keeps_infinities_and_nan(device, case):
    tensors, geometry = tucker2_case(PERSISTENT[case], torch.bfloat16)
    tensors[0][0, 1, 2, 4] = float("inf")
    tensors[0][0, 2, 4, 12] = float("nan")
    tensors = (tensors[0], *(w.abs() for w in tensors[1:]))
    y, *_ = device.tucker2(*tensors, *geometry, True, "ascending", form="persistent")
    want = tucker2_definition(tensors, geometry)
    assert want.isinf().any()
    assert torch.equal(want.isinf(), y.isinf())
    assert torch.equal(want.isnan(), y.isnan())
    assert error(y[y.isfinite()], want[y.isfinite()]) < TOLERANCE[torch.bfloat16]


def test_tucker2_persistent_where_it_cannot_be_is_fused(device):
    tensors, geometry = tucker2_case(PERSISTENT["plain"], torch.bfloat16)
    planes = tucker2_case(PERSISTENT["plain"], torch.bfloat16, torch.contiguous_format)[0]
    wide = tucker2_case(WIDE, torch.bfloat16)
    exact = tucker2_case(PERSISTENT["plain"], torch.float32)
    for (given, where), options in (
        ((tensors, geometry), {"bulk": False}),
        ((tensors, geometry), {"keep": True}),
        ((planes, geometry), {}),
        (wide, {}),
        (exact, {}),
    ):
        y, *_, call = device.tucker2(*given, *where, True, "ascending", form="persistent", **options)
        assert not call.persistent
        assert error(y, tucker2_definition(given, where)) < TOLERANCE[given[0].dtype]


def test_tucker2_persistent_reads_a_view_of_channels(device):
    tensors, geometry = tucker2_case(PERSISTENT["plain"], torch.bfloat16)
    x = torch.randn(2, 9, 9, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    for first, taken in ((8, True), (4, False)):  # at a multiple of 16 bytes, and not
        view = x[..., first : first + 16].permute(0, 3, 1, 2)
        y, *_, call = device.tucker2(view, *tensors[1:], *geometry, True, "ascending", form="persistent")
        assert call.persistent == taken
        assert error(y, tucker2_definition((view, *tensors[1:]), geometry)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", ["fused", "persistent"])
def test_tucker2_where_strides_do_not_grow_outward(device, form):
    """Images that are one, or turned: bulk copies have them not."""
    tensors, geometry = tucker2_case(PERSISTENT["plain"], torch.bfloat16)
    x = tensors[0]
    for view in (x[:1].expand(2, -1, -1, -1), x.transpose(2, 3)):
        y, *_, call = device.tucker2(view, *tensors[1:], *geometry, True, "ascending", form=form)
        assert not call.persistent
        assert error(y, tucker2_definition((view, *tensors[1:]), geometry)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("channels", "size", "blocks"), [(64, 56, 396), (128, 28, 264), (256, 14, 132)])
def test_tucker2_persistent_plan_of_resnet(device, channels, size, blocks):
    """C / 4 at batch 128: three, two and one block a multiprocessor, by the room that the factors take."""
    call = plan(device, channels, size, 4, 128, form="persistent")
    assert call.persistent
    assert (call.launches, call.workspace, call.blocks) == (1, 0, blocks)
    assert call.most_shared <= H200_SHARED / (blocks / 132) - 1024
