"""Values and gradients of the fused Tucker-2 convolution against float64."""

import pytest
import torch
import torch.nn.functional as F
from needs import needs_native
from torch.utils.flop_counter import FlopCounterMode
from tucker2_cases import GEOMETRIES, TOLERANCE, assert_close, check_gradients, exact, make

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.ops import reference


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_forward(name: str, layout: str, dtype: torch.dtype) -> None:
    tensors, rest = make(GEOMETRIES[name], dtype)
    if layout == "channels_last":
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    for activation in (None, "relu"):
        y = tucker_conv2d(*tensors, *rest, activation)
        assert y.dtype == dtype
        assert_close(y, exact(tensors, rest, activation), TOLERANCE[dtype])
    if layout == "channels_last" and min(y.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_instruction_set(name: str, channels_last: bool, isa: str) -> None:
    compiled = kegfast.build_info()["isa_compiled"]
    detected = kegfast.build_info()["isa_detected"]
    if isa not in compiled or compiled.index(isa) > compiled.index(detected):
        pytest.skip(f"this machine cannot run {isa}")
    tensors, rest = make(GEOMETRIES[name], torch.float32, channels_last=channels_last)
    want = exact(tensors, rest)
    with kegfast.cpu_isa(isa):
        assert_close(tucker_conv2d(*tensors, *rest), want, TOLERANCE[torch.float32])
        check_gradients(tensors, rest, 1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients(name: str, channels_last: bool) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.float32, channels_last=channels_last)
    check_gradients(tensors, rest, 1e-5)


@needs_native
def test_a_stride_far_beyond_the_image_takes_no_longer() -> None:
    tensors, _ = make(GEOMETRIES["3x3"], torch.float32)
    grads = []
    for stride in (20, 2**24):  # visited pixel by pixel, the second would take hours
        leaves = [t.detach().requires_grad_() for t in tensors]
        tucker_conv2d(*leaves, stride, 1).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "rank 2"])
def test_gradients_of_half_types(name: str, dtype: torch.dtype) -> None:
    tensors, rest = make(GEOMETRIES[name], dtype)
    check_gradients(tensors, rest, 3e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("name", ["3x3", "rank 2", "dilated"])
def test_recomputed_gradients_are_the_kept_ones(name: str) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.float32)
    grads = []
    for recompute in (False, True):
        leaves = [t.detach().requires_grad_() for t in tensors]
        tucker_conv2d(*leaves, *rest, "relu", recompute).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


SUMS = {
    "strided": (3, 20, 15, 13, 9, 18, 24, (3, 3), 2, 1, 1),
    "strided unevenly": (2, 8, 17, 14, 4, 6, 7, (5, 3), (2, 3), (2, 1), 1),
    "strided, tails": (2, 40, 11, 12, 24, 36, 20, (3, 3), 2, 1, 1),
    "strided, small images": (21, 16, 8, 8, 16, 32, 20, (3, 3), 2, 1, 1),
    "strided, several bands": (2, 8, 75, 60, 8, 12, 10, (3, 3), 2, 1, 1),
    "rank 2 in lanes": (3, 5, 12, 7, 2, 2, 9, (3, 3), 1, 1, 1),
    "rank 4 in lanes": (2, 10, 31, 37, 4, 4, 12, (3, 3), 1, (1, 2), (2, 1)),
    "rank 8 in lanes, several bands": (2, 10, 40, 37, 8, 8, 12, (3, 3), 1, 1, 1),
    "segments side by side": (2, 20, 9, 14, 3, 5, 17, (5, 5), 1, 2, 1),
    "large sums": (5, 24, 7, 7, 256, 96, 20, (3, 3), 1, 1, 1),
    "large sums, strided": (6, 16, 8, 8, 128, 96, 20, (3, 3), 2, 1, 1),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["3x3", "winograd, odd sizes", "padding beyond kernel", *SUMS])
def test_relu_gradients(name: str, channels_last: bool) -> None:
    tensors, rest = make((GEOMETRIES | SUMS)[name], torch.float32, channels_last=channels_last)
    check_gradients(tensors, rest, 1e-5, "relu")


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("name", SUMS)
def test_gradients_of_every_instruction_set(name: str, isa: str) -> None:
    compiled = kegfast.build_info()["isa_compiled"]
    if isa not in compiled or compiled.index(isa) > compiled.index(kegfast.build_info()["isa_detected"]):
        pytest.skip(f"this machine cannot run {isa}")
    with kegfast.cpu_isa(isa):
        tensors, rest = make(SUMS[name], torch.float32)
        check_gradients([tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]], rest, 1e-5)


@needs_native
def test_a_frozen_layer_costs_no_weight_gradient() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    x = tensors[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = tucker_conv2d(x, *tensors[1:], *rest)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_run_inside_the_operator(stride: int) -> None:
    tensors, rest = make((2, 8, 9, 9, 4, 4, 8, (3, 3), stride, 1, 1), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as counter:
        tucker_conv2d(*leaves, *rest, "relu").sum().backward()
    names = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert names == {"kegfast.tucker2_forward", "kegfast.tucker2_gradients"}


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("name", ["3x3", "rank 2"])
def test_gradients_only_for_what_needs_them(name: str, wanted: int) -> None:
    tensors, rest = make(GEOMETRIES[name], torch.float32)
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    doubles = [t.double().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    tucker_conv2d(*leaves, *rest).square().sum().backward()
    reference.tucker_conv2d(*doubles, *rest, None).square().sum().backward()
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(5)]
    got, want = leaves[wanted].grad.double(), doubles[wanted].grad
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_native
def test_frozen_weights_keep_no_intermediates() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    x = tensors[0].requires_grad_()
    y = tucker_conv2d(x, *tensors[1:], *rest)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.float32]
    assert sum(t.numel() for t in kept) == x.numel() + sum(t.numel() for t in tensors[1:4])


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[1:, 2:9],
        lambda x: x[:, :, 1:, 2:],
        lambda x: x[:, :, ::2, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(3),
        lambda x: x[:1, :1].expand(3, 6, -1, -1),
    ],
    ids=["channels", "pixels", "steps", "transposed", "flipped", "expanded"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_slices(cut, channels_last: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 12, 13, generator=rng)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = cut(x)
    tensors, rest = make((1, x.shape[1], 1, 1, 6, 5, 7, (3, 3), 1, 1, 1), torch.float32)
    check_gradients([x, *tensors[1:]], rest, 1e-5)
    with torch.no_grad():
        y = tucker_conv2d(x, *tensors[1:], *rest)
    assert_close(y, exact([x, *tensors[1:]], rest), 5e-6)


@pytest.mark.parametrize("size", [3, 8])  # of one pixel, which lies in both layouts, and of more
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_x_lies_as_x(layout: torch.memory_format, size: int) -> None:
    tensors, rest = make((2, 6, size, size, 3, 4, 5, (3, 3), 1, 0, 1), torch.float32)
    x = tensors[0].contiguous(memory_format=layout).requires_grad_()
    y = tucker_conv2d(x, *tensors[1:], *rest, "relu")
    (grad,) = torch.autograd.grad(y, x, torch.ones(y.shape))
    assert grad.is_contiguous(memory_format=layout)


def test_weights_in_any_strides() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    strided = [t.contiguous(memory_format=torch.channels_last) for t in tensors[1:4]]
    strided[0] = tensors[1].transpose(0, 1).contiguous().transpose(0, 1)
    got = tucker_conv2d(tensors[0], *strided, tensors[4], *rest)
    assert torch.equal(got, tucker_conv2d(*tensors, *rest))
    check_gradients([tensors[0], *strided, tensors[4]], rest, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_do_not_change_the_result(batch: int, threads: int) -> None:
    geometry = (batch, 64, 37, 35, 48, 32, 64, (3, 3), 1, 1, 1)  # above the serial break-even
    tensors, rest = make(geometry, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_close(tucker_conv2d(*tensors, *rest), exact(tensors, rest), 5e-6)
        check_gradients(tensors, rest, 2e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 4, 8, 8)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    tensors, rest = make((*shape, 3, 2, 5, (3, 3), 2, 1, 1), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    y = tucker_conv2d(*leaves, *rest)
    assert y.shape == (shape[0], 5, 4, 4)
    y.sum().backward()
    assert leaves[0].grad.shape == shape
    assert (leaves[2].grad == 0).all().item() is (shape[0] == 0)


def test_bias_is_optional() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    got = tucker_conv2d(*tensors[:4], None, *rest)
    assert_close(got, exact([*tensors[:4], torch.zeros(24)], rest), 5e-6)


@needs_native
def test_denormals_are_flushed_inside_and_kept_outside() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    tiny = torch.full((4,), 1e-40)
    assert (tucker_conv2d(tensors[0] * 1e-40, *tensors[1:4], None, *rest) == 0).all()
    assert (tiny * 1.0 != 0).all()  # the caller's mode is what it was


def test_not_a_number_stays_where_its_window_reaches() -> None:
    tensors, rest = make((1, 4, 8, 8, 3, 2, 5, (3, 3), 1, 1, 1), torch.float32)
    tensors[0][0, 0, 2, 2] = float("nan")
    for x in (tensors[0], tensors[0].contiguous(memory_format=torch.channels_last)):
        nan = tucker_conv2d(x, *tensors[1:], *rest).isnan().any(1)[0]
        want = torch.zeros(8, 8, dtype=torch.bool)
        want[1:4, 1:4] = True
        assert torch.equal(nan, want)


@pytest.mark.parametrize("channels", [64, 512])
def test_error_is_that_of_torch_convolutions(channels: int) -> None:
    rank = channels // 2
    tensors, rest = make((4, channels, 14, 14, rank, rank, channels, (3, 3), 1, 1, 1), torch.float32)
    want = exact(tensors, rest)
    error = (tucker_conv2d(*tensors, *rest).double() - want).norm()
    theirs = (reference.tucker_conv2d(*tensors, *rest, None).double() - want).norm()
    assert error <= 1.5 * theirs


def test_gradcheck_in_float64() -> None:
    tensors, rest = make((1, 2, 4, 4, 2, 2, 3, (3, 3), 2, 1, 1), torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *a: tucker_conv2d(*a, *rest), leaves)


@needs_native
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_the_kernels(stride: int) -> None:
    tensors, rest = make((1, 2, 5, 4, 2, 3, 3, (3, 2), stride, 1, 1), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    # Multilinear in its arguments: central differences are exact up to rounding, so steps are large.
    assert torch.autograd.gradcheck(
        lambda *a: tucker_conv2d(*a, *rest), leaves, eps=0.25, atol=1e-3, rtol=1e-3
    )


BAD = {
    "x a list": ({"x": [1.0]}, TypeError, "x must be a floating"),
    "x sparse": ({"x": torch.ones(1, 4, 8, 8).to_sparse()}, TypeError, "x must be a floating"),
    "x of integers": ({"x": torch.ones(1, 4, 8, 8, dtype=torch.int64)}, TypeError, "x must be a floating"),
    "x of 2 dimensions": ({"x": torch.ones(8, 8)}, ValueError, "x must be 4-dimensional"),
    "x of other channels": ({"x": torch.ones(1, 5, 8, 8)}, ValueError, "first must be"),
    "x too small": ({"x": torch.ones(1, 4, 2, 8), "padding": 0}, ValueError, "x must be at least 3 x 3"),
    "first of 3x3": ({"first": torch.ones(3, 4, 3, 3)}, ValueError, "first must be"),
    "core of other rank": ({"core": torch.ones(2, 4, 3, 3)}, ValueError, "core must be"),
    "empty core": ({"core": torch.ones(0, 3, 3, 3)}, ValueError, "core must be"),
    "last of other rank": ({"last": torch.ones(5, 3, 1, 1)}, ValueError, "last must be"),
    "bias of other size": ({"bias": torch.ones(4)}, ValueError, "bias must be"),
    "mixed dtypes": ({"core": torch.ones(2, 3, 3, 3).double()}, TypeError, "core must be of x's dtype"),
    "mixed devices": ({"last": torch.ones(5, 2, 1, 1, device="meta")}, ValueError, "last must be on"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be"),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, "stride must be"),
    "padding -1": ({"padding": -1}, ValueError, "padding must be"),
    "padding past any image": ({"padding": 2**63 - 1}, ValueError, "padding must be"),
    "stride past 64 bits": ({"stride": 2**70}, ValueError, "stride must be"),
    "padding a string": ({"padding": "same"}, ValueError, "padding must be"),
    "dilation a fraction": ({"dilation": 1.5}, ValueError, "dilation must be"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    change, error, message = BAD[name]
    good = {
        "x": torch.ones(1, 4, 8, 8),
        "first": torch.ones(3, 4, 1, 1),
        "core": torch.ones(2, 3, 3, 3),
        "last": torch.ones(5, 2, 1, 1),
        "bias": torch.ones(5),
        "padding": 1,
    }
    with pytest.raises(error, match=message):
        tucker_conv2d(**(good | change))


def test_reference_backend_agrees() -> None:
    tensors, rest = make(GEOMETRIES["3x3"], torch.float32)
    with kegfast.backend("reference"):
        y = tucker_conv2d(*tensors, *rest)
    want = F.conv2d(F.conv2d(F.conv2d(tensors[0], tensors[1]), tensors[2], None, *rest), *tensors[3:])
    assert torch.equal(y, want)
