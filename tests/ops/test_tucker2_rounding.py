"""What the fused Tucker-2 convolution keeps of small numbers and of long sums."""

import pytest
import torch
from needs import needs_native
from tucker2_cases import make

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.ops import reference

pytestmark = needs_native
LAYOUTS = [torch.contiguous_format, torch.channels_last]
HALF = torch.float16


@pytest.fixture(params=kegfast.build_info().get("isa_compiled", []))
def isa(request):
    try:
        with kegfast.cpu_isa(request.param):
            yield
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_the_gradient_of_bias_is_summed_by_blocks(isa, threads, layout, value):
    x = torch.ones(64, 2, 56, 56).contiguous(memory_format=layout)
    weights = [torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1), torch.ones(5, 2, 1, 1)]
    bias = torch.zeros(5, requires_grad=True)
    y = tucker_conv2d(x, *weights, bias)
    y.backward(torch.full_like(y, value))
    exact = torch.tensor(value).double() * 64 * 56 * 56
    assert ((bias.grad.double() - exact).abs() <= 4e-7 * exact).all()


def halves_apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """How many units in the last place of float16 two tensors differ by, at most."""
    unit = torch.maximum(want.abs().log2().floor().exp2() * 2.0**-10, torch.tensor(2.0**-24).double())
    return ((got.double() - want).abs() / unit).max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [1, 3, 7, 16, 37])  # tails of vectors and whole ones
def test_subnormal_halves_are_numbers(isa, threads, layout, pixels):
    values = torch.tensor([5e-5, 6e-8, -6.1e-5, 3e-6, -2e-5]).half()
    x = values.repeat(pixels)[: 2 * 3 * pixels].reshape(1, -1, 1, pixels) if pixels > 4 else values[:3]
    x = x.reshape(1, -1, 1, 1) if x.dim() == 1 else x
    x = x.contiguous(memory_format=layout).requires_grad_()
    channels = x.shape[1]
    weights = [torch.ones(4, channels, 1, 1), torch.ones(4, 4, 1, 1), torch.ones(5, 4, 1, 1)]
    weights = [w.half().requires_grad_() for w in weights]
    y = tucker_conv2d(x, *weights)
    gradient = torch.full_like(y, 2e-5)
    grads = torch.autograd.grad(y, [x, *weights], gradient)
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    want = reference.tucker_conv2d(*leaves, None, (1, 1), (0, 0), (1, 1), None)
    assert want.abs().max() > 1e-5
    assert halves_apart(y.detach(), want.detach()) <= 0.51
    for got, exact in zip(grads, torch.autograd.grad(want, leaves, gradient.double()), strict=True):
        assert halves_apart(got, exact) <= 0.51


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-5])
def test_float16_is_as_exact_as_torchs_convolutions(isa, layout, scale):
    tensors, rest = make((3, 33, 12, 13, 17, 24, 35, (3, 3), 1, 1, 1), HALF)
    tensors = [(tensors[0] * scale).contiguous(memory_format=layout), *tensors[1:4], tensors[4] * scale]
    exact = reference.tucker_conv2d(*(t.double() for t in tensors), *rest, None)
    errors = [
        (function(*tensors, *rest, None).double() - exact).norm()
        for function in (tucker_conv2d, reference.tucker_conv2d)
    ]
    assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("stride", [1, 2])
def test_float16_gradients_of_a_dilated_core_are_rounded_once(isa, stride):
    tensors, rest = make((2, 9, 14, 13, 6, 7, 11, (3, 3), stride, 5, 2), HALF)
    leaves = [t.requires_grad_() for t in tensors]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y = tucker_conv2d(*leaves, *rest)
    want = reference.tucker_conv2d(*doubles, *rest, None)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).half()
    for got, exact in zip(
        torch.autograd.grad(y, leaves, seed), torch.autograd.grad(want, doubles, seed.double()), strict=True
    ):
        assert (got.double() - exact).abs().max() <= 0.51 * 2.0**-10 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, torch.float32])
def test_no_image_has_gradients(isa, dtype):
    tensors, rest = make((0, 3, 6, 6, 3, 5, 2, (3, 3), 1, 1, 1), dtype)
    leaves = [t.requires_grad_() for t in tensors]
    y = tucker_conv2d(*leaves, *rest, "relu")
    grads = torch.autograd.grad(y, leaves, torch.zeros_like(y))
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all((g == 0).all() for g in grads)
