"""A convolution with its max pooling: the operator against float64, in torch's machinery, on bad input."""

import pytest
import torch
from needs import needs_native
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kegfast
from kegfast.ops import reference
from kegfast.ops.conv_max_pool import conv_max_pool2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# (N, C, H, W), K, kernel, stride, padding, pool, pool_stride, pool_padding
CASES = {
    "ResNet's stem": ((2, 3, 38, 45), 64, (7, 7), (2, 2), (3, 3), (3, 3), (2, 2), (1, 1)),
    "LeNet5's first": ((3, 1, 32, 32), 6, (5, 5), (1, 1), (0, 0), (2, 2), (2, 2), (0, 0)),
    "its second": ((2, 6, 14, 14), 16, (5, 5), (1, 1), (0, 0), (2, 2), (2, 2), (0, 0)),
    "long sums": ((1, 40, 9, 11), 20, (3, 3), (1, 1), (1, 1), (2, 2), (2, 2), (1, 1)),
    "uneven": ((2, 5, 17, 13), 37, (2, 4), (3, 1), (0, 5), (2, 5), (1, 3), (1, 2)),
    "gaps between windows": ((1, 2, 20, 20), 3, (3, 3), (1, 1), (1, 1), (1, 2), (3, 4), (0, 0)),
    "one pixel": ((1, 3, 3, 3), 2, (3, 3), (1, 1), (0, 0), (1, 1), (1, 1), (0, 0)),
    "bands": ((1, 4, 150, 130), 48, (3, 3), (1, 1), (1, 1), (3, 3), (2, 2), (1, 1)),
}


def tensors(name, layout=torch.contiguous_format, bias=True):
    """x, weight and bias of a case, and its geometry."""
    shape, features, kernel, *geometry = CASES[name]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng).contiguous(memory_format=layout)
    weight = torch.randn(features, shape[1], *kernel, generator=rng).contiguous(memory_format=layout)
    return (x, weight, torch.randn(features, generator=rng) if bias else None), geometry


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition_in_float64(name, layout, activation, threads):
    given, geometry = tensors(name, layout, bias=activation is None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = conv_max_pool2d(*given, *geometry, activation)
    finally:
        torch.set_num_threads(before)
    double = (t if t is None else t.double() for t in given)
    wanted = reference.conv_max_pool2d(*double, *geometry, activation)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    one_channel = given[0].shape[1] == 1  # for which there is one layout
    assert y.is_contiguous(memory_format=torch.contiguous_format if one_channel else layout)


@needs_native
@pytest.mark.parametrize("isa", [isa for isa in kegfast.build_info().get("isa_compiled", [])])
def test_on_every_instruction_set(isa):
    try:
        with kegfast.cpu_isa(isa):
            for name in CASES:
                given, geometry = tensors(name)
                wanted = reference.conv_max_pool2d(*(t.double() for t in given), *geometry, "relu")
                y = conv_max_pool2d(*given, *geometry, "relu")
                torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    except ValueError as error:
        pytest.skip(str(error))


def test_sliced_and_expanded_input():
    (x, weight, bias), geometry = tensors("its second")
    wide = torch.randn(2, 6, 14, 40)
    for given in (wide[..., 3:31:2], wide.transpose(2, 3)[:, :, :20], x[:1].expand(3, -1, -1, -1)):
        wanted = reference.conv_max_pool2d(given.double(), weight.double(), bias.double(), *geometry, None)
        y = conv_max_pool2d(given, weight, bias, *geometry)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert conv_max_pool2d(x[:0], weight, bias, *geometry).shape == (0, 16, 5, 5)


def test_pooling_is_by_its_own_size_unless_told_otherwise():
    x = torch.randn(1, 2, 9, 9)
    weight = torch.randn(3, 2, 3, 3)
    wanted = nn.functional.max_pool2d(nn.functional.conv2d(x, weight), 2)
    torch.testing.assert_close(conv_max_pool2d(x, weight), wanted, rtol=1e-5, atol=1e-5)


def test_nan_stays():
    (x, weight, bias), geometry = tensors("ResNet's stem")
    x[1, 2, 20, 20] = torch.nan
    y = conv_max_pool2d(x, weight, bias, *geometry, "relu")
    wanted = reference.conv_max_pool2d(x, weight, bias, *geometry, "relu")
    assert wanted.isnan().any()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ResNet's stem", "uneven", "one pixel"])
def test_opcheck(name, layout):
    given, geometry = tensors(name, layout)
    ints = [n for two in geometry for n in two]
    arguments = (*given, *ints, True, layout is torch.channels_last)
    torch.library.opcheck(torch.ops.kegfast.conv_max_pool.default, arguments)


def test_gradients_are_torchs():
    given, geometry = tensors("its second")
    leaves = [t.double().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *t: conv_max_pool2d(*t, *geometry, "relu"), leaves, fast_mode=True)
    leaves = [t.requires_grad_() for t in given]
    conv_max_pool2d(*leaves, *geometry, "relu").sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torchs(dtype):
    given, geometry = tensors("LeNet5's first")
    given = [t.to(dtype) for t in given]
    y = conv_max_pool2d(*given, *geometry)
    assert y.dtype == dtype
    assert torch.equal(y, reference.conv_max_pool2d(*given, *geometry, None))


@needs_native
def test_compiled_without_a_break_and_counted():
    given, geometry = tensors("ResNet's stem", torch.channels_last)

    def run(*t):
        return conv_max_pool2d(*t, *geometry, "relu") + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), run(*given))
    with FlopCounterMode(display=False) as counter:
        run(*given)
    assert counter.get_total_flops() == 2 * 2 * 19 * 23 * 64 * 3 * 49


def test_bad_input_is_named():
    (x, weight, bias), geometry = tensors("ResNet's stem")
    for change, error, name in [
        ({"x": 1}, TypeError, "x"),
        ({"x": x[0]}, ValueError, "x"),
        ({"x": x.int()}, TypeError, "x"),
        ({"x": x[:, :, :1, :1], "padding": 0}, ValueError, "x"),
        ({"weight": weight[:, :2]}, ValueError, "weight"),
        ({"weight": weight.double()}, TypeError, "weight"),
        ({"bias": bias[1:]}, ValueError, "bias"),
        ({"x": x.to_sparse()}, TypeError, "x"),
        ({"stride": 0}, ValueError, "stride"),
        ({"stride": 1.5}, ValueError, "stride"),
        ({"padding": -1}, ValueError, "padding"),
        ({"pool": (3,)}, ValueError, "pool"),
        ({"pool_padding": 2}, ValueError, "pool_padding"),
        ({"pool": 200}, ValueError, "x"),
        ({"activation": "gelu"}, ValueError, "activation"),
    ]:
        names = ("stride", "padding", "pool", "pool_stride", "pool_padding")
        given = {"x": x, "weight": weight, "bias": bias, **dict(zip(names, geometry, strict=True))}
        with pytest.raises(error, match=rf"^{name}\b"):
            conv_max_pool2d(**(given | change))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 2, 8, 2), (1, 2, 2, 8), (1, 2, 4, 4)])
def test_a_convolution_that_leaves_nothing_is_refused(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # the pool's padding alone would hold its window
        with pytest.raises(ValueError, match=r"^x must be at least as large as both windows"):
            conv_max_pool2d(torch.ones(shape), torch.ones(3, 2, 5, 5), pool=2, pool_padding=1)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_the_operator_itself_refuses_it_too():
    for shape in [(1, 2, 8, 2), (1, 2, 2, 8)]:
        with pytest.raises(RuntimeError, match="x must be at least as large"):
            torch.ops.kegfast.conv_max_pool(
                torch.ones(shape), torch.ones(3, 2, 5, 5), None, 1, 1, 0, 0, 2, 2, 2, 2, 1, 1, False, False
            )


@needs_native
def test_a_failure_of_the_kernel_is_not_tried_again(monkeypatch):
    calls = []

    def failing(*_):
        calls.append(1)
        raise RuntimeError("the kernel's own")

    monkeypatch.setattr("kegfast.ops.conv_max_pool._run", failing)
    x, weight = torch.ones(1, 2, 8, 8), torch.ones(3, 2, 3, 3)
    with pytest.raises(RuntimeError, match="the kernel's own"):
        conv_max_pool2d(x, weight)
    assert len(calls) == 1


@needs_native
def test_lists_are_pairs():
    x, weight = torch.ones(1, 2, 8, 8), torch.ones(3, 2, 3, 3)
    assert torch.equal(conv_max_pool2d(x, weight, pool=[2, 2]), conv_max_pool2d(x, weight, pool=(2, 2)))
