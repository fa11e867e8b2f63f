"""torch's convolutions never see half types on the CPU, nor gradients of a layout that they do not take."""

import pytest
import torch
from needs import needs_native
from torch.utils._python_dispatch import TorchDispatchMode
from tucker2_cases import relative_error

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.ops import reference
from kegfast.ops.conv_max_pool import conv_max_pool2d

HALVES = [torch.bfloat16, torch.float16]
# (N, C, H, W), (K, C, kh, kw), stride, padding, dilation: of oneDNN 3.12 with AMX wrong, or deadly
FAULTS = {
    "one column under a stride": ((1, 3, 6, 1), (7, 3, 2, 3), (1, 2), (0, 1), (1, 1)),
    "8 channels, 8 columns of taps": ((2, 8, 19, 22), (3, 8, 8, 8), (1, 1), (1, 1), (1, 1)),
    "a window as wide as its stride": ((1, 16, 14, 20), (16, 16, 5, 4), (2, 4), (2, 0), (1, 1)),
    "an image that a stride leaps over": ((2, 16, 8, 1), (64, 16, 3, 1), (2, 2), (0, 1), (1, 2)),
}


class Convolutions(TorchDispatchMode):
    """Notes the tensors that torch's own convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "convolution" in function.name():
            self.seen.append([t for t in args if isinstance(t, torch.Tensor)])
        return function(*args, **(kwargs or {}))


def case(name: str, dtype: torch.dtype) -> list:
    shape, weight, *geometry = FAULTS[name]
    rng = torch.Generator().manual_seed(0)
    return [*(torch.randn(size, generator=rng).to(dtype) for size in (shape, weight)), *geometry]


def close(y: torch.Tensor, want: torch.Tensor) -> bool:
    if not want.any():  # the padding alone is seen
        return torch.equal(y.double(), want)
    return relative_error(y, want) <= torch.finfo(y.dtype).eps


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name][4] == (1, 1)])
def test_a_convolution_with_its_pooling(name, dtype, training, backend):
    x, weight, stride, padding, _ = case(name, dtype)
    pooling = (2, 1), (1, 1), (0, 0)
    leaves = [t.clone().requires_grad_(training) for t in (x, weight)]
    with kegfast.backend(backend), Convolutions() as given:
        y = conv_max_pool2d(*leaves, None, stride, padding, *pooling)
    want = reference.conv_max_pool2d(x.double(), weight.double(), None, stride, padding, *pooling, None)
    assert y.dtype is dtype
    assert close(y.detach(), want)
    assert all(t.dtype is torch.float32 for call in given.seen for t in call)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FAULTS)
def test_the_reference_of_three(name, dtype):
    x, core, *geometry = case(name, dtype)
    first, last = (torch.eye(n, dtype=dtype)[:, :, None, None] for n in core.shape[1::-1])
    want = reference.tucker_conv2d(*(t.double() for t in (x, first, core, last)), None, *geometry, None)
    with kegfast.backend("reference"), Convolutions() as given:
        y = tucker_conv2d(x, first, core, last, None, *geometry)
    assert len(given.seen) == 3
    assert all(t.dtype is torch.float32 for call in given.seen for t in call)
    assert y.dtype is dtype
    assert close(y, want)


def test_autocast_takes_the_same_way():
    x, weight, stride, padding, _ = case("one column under a stride", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_max_pool2d(x, weight, None, stride, padding, 1)
        with kegfast.backend("reference"):
            again = conv_max_pool2d(x, weight, None, stride, padding, 1)
    rounded = x.bfloat16().double(), weight.bfloat16().double()
    want = reference.conv_max_pool2d(*rounded, None, stride, padding, (1, 1), (1, 1), (0, 0), None)
    assert y.dtype is torch.bfloat16
    assert close(y, want)
    assert torch.equal(y, again)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def sliced(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t], -1)[..., 0]


LAYOUTS = {
    "expanded": lambda t: t[:1, :1].expand(t.shape),
    "transposed": transposed,
    "sliced": sliced,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_handed_to_torch_in_one_dense_layout(dtype, layout, recompute, threads):
    """Under dilation and strides the gradients are torch's: of any layout of x, the core and the gradient."""
    shape = LAYOUTS[layout]
    rng = torch.Generator().manual_seed(0)
    sizes = (3, 2, 14, 14), (96, 2, 1, 1), (8, 96, 1, 5), (5, 8, 1, 1)
    leaves = [shape(torch.randn(size, generator=rng).to(dtype)).requires_grad_() for size in sizes]
    geometry = (2, 2), (0, 2), (2, 1)
    y = tucker_conv2d(*leaves, None, *geometry, None, recompute)
    grad = shape(torch.randn(y.shape, generator=rng).to(dtype))
    with Convolutions() as given:
        found = torch.autograd.grad(y, leaves, grad)
    for call in given.seen:
        layouts = [torch.contiguous_format, torch.channels_last]
        assert any(all(t.is_contiguous(memory_format=layout) for t in call) for layout in layouts)
        assert all(t.dtype is torch.float32 for t in call)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(reference.tucker_conv2d(*wide, None, *geometry, None), wide, grad.double())
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) <= 4 * max(torch.finfo(dtype).eps, 1e-6)
