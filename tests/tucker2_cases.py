"""Geometries of Tucker-2 convolutions, their operands, and the comparison with float64."""

import torch
from torch import Tensor

import kegfast
from kegfast.functional import tucker_conv2d
from kegfast.nn import TuckerConv2d
from kegfast.ops import reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-13}

#  N, C, H, W, R1, R2, K, kernel, stride, padding, dilation
GEOMETRIES = {
    "3x3": (2, 16, 9, 11, 8, 8, 24, (3, 3), 1, 1, 1),
    "lenet": (3, 6, 14, 14, 3, 8, 16, (5, 5), 1, 0, 1),
    "odd ranks": (2, 20, 13, 14, 10, 25, 50, (5, 5), 1, 0, 1),
    "rank 1": (5, 3, 8, 8, 1, 1, 1, (3, 3), 3, 1, 1),
    "rank 2": (2, 7, 9, 11, 2, 2, 5, (3, 2), (2, 1), (1, 2), 1),
    "ranks above channels": (1, 2, 6, 7, 5, 19, 3, (2, 2), 1, 1, 1),
    "1x1": (2, 5, 20, 3, 4, 3, 9, (1, 1), 1, 0, 1),
    "1x1 strided": (2, 5, 20, 3, 4, 3, 9, (1, 1), (3, 2), (1, 0), 1),
    "11x7": (1, 16, 30, 33, 9, 17, 33, (11, 7), 1, (5, 3), 1),
    "dilated": (2, 5, 20, 30, 4, 3, 9, (3, 5), (1, 2), (3, 2), (2, 3)),
    "stride beyond kernel": (2, 4, 17, 19, 6, 4, 5, (2, 2), (5, 4), 0, 1),
    "stride beyond image": (2, 4, 17, 19, 6, 4, 5, (2, 2), (50, 40), 1, 1),
    "padding beyond kernel": (2, 4, 5, 6, 3, 4, 5, (2, 3), 1, (3, 4), 1),
    "many small images": (19, 32, 7, 7, 48, 40, 20, (3, 3), 1, 1, 1),
    "several bands": (1, 12, 61, 58, 24, 16, 20, (3, 3), 1, 1, 1),
    "several windows": (1, 4, 90, 200, 16, 16, 8, (3, 3), (2, 1), 1, 1),
    "one pixel": (1, 1, 1, 1, 1, 1, 1, (1, 1), 1, 0, 1),
    "one column": (2, 3, 5, 1, 2, 2, 4, (2, 1), 1, 0, 1),
    "winograd, odd sizes": (3, 20, 9, 11, 32, 48, 24, (3, 3), 1, 1, 1),
    "winograd, small images": (9, 16, 7, 7, 32, 32, 17, (3, 3), 1, 1, 1),
    "winograd, several bands": (1, 8, 45, 50, 48, 32, 20, (3, 3), 1, (0, 2), 1),
    "tails of 8 and 4": (2, 40, 9, 10, 24, 20, 50, (3, 3), 1, 1, 1),
    "tails of 1, 7 and 2": (2, 36, 8, 9, 33, 39, 50, (3, 3), 1, 1, 1),
    "tails of 3 and 8, dilated": (1, 33, 12, 11, 19, 40, 20, (3, 3), 1, 2, 2),
    "two tails below a vector": (2, 34, 9, 9, 10, 12, 26, (3, 3), 1, 1, 1),
    "wide features": (1, 3, 5, 5, 33, 34, 130, (3, 3), 1, 1, 1),
    "three taps at once": (2, 9, 12, 37, 20, 16, 24, (3, 3), 1, 1, 1),
    "three taps, one at a time": (1, 9, 12, 19, 40, 14, 24, (3, 3), 1, 1, 1),
    "five taps at once": (2, 20, 14, 23, 5, 13, 24, (5, 5), 1, 2, 1),
    "three taps, two rows apart": (1, 9, 12, 17, 6, 13, 20, (2, 3), 1, 1, (2, 1)),
    "three taps of packed lanes": (2, 9, 12, 37, 4, 4, 24, (3, 3), 1, 1, 1),
    "five taps of packed lanes": (2, 20, 14, 23, 8, 8, 24, (5, 5), 1, 2, 1),
    "five taps of packed lanes, a part of them": (2, 7, 11, 19, 4, 3, 9, (5, 5), 1, 2, 1),
    "large factors": (2, 144, 9, 14, 64, 144, 136, (3, 3), 2, 1, 1),
}


def make(
    geometry: tuple, dtype: torch.dtype, seed: int = 0, channels_last: bool = False
) -> tuple[list[Tensor], tuple]:
    """(x, first, core, last, bias) with variance-preserving factors, and (stride, padding, dilation)."""
    n, c, h, w, r1, r2, k, (kh, kw), *rest = geometry
    rng = torch.Generator().manual_seed(seed)
    shapes = [(n, c, h, w), (r1, c, 1, 1), (r2, r1, kh, kw), (k, r2, 1, 1), (k,)]
    fans = [1, c, r1 * kh * kw, r2, 1]
    tensors = [
        torch.randn(shape, generator=rng, dtype=torch.float64) / fan**0.5
        for shape, fan in zip(shapes, fans, strict=True)
    ]
    tensors = [t.to(dtype) for t in tensors]
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors, tuple(rest)


def exact(tensors: list[Tensor], rest: tuple, activation: str | None = None) -> Tensor:
    return reference.tucker_conv2d(*[t.double() for t in tensors], *rest, activation)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item())
    assert (got.double() - want).abs().max().item() <= tolerance * scale


def check_gradients(
    tensors: list[Tensor], rest: tuple, tolerance: float, activation: str | None = None, **kwargs
) -> None:
    leaves = [t.detach().requires_grad_() for t in tensors]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y = tucker_conv2d(*leaves, *rest, activation, **kwargs)
    want = reference.tucker_conv2d(*doubles, *rest, activation)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(gradient.to(y.dtype))
    want.backward(gradient.to(y.dtype).double())
    for leaf, double in zip(leaves, doubles, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        scale = max(1e-3, double.grad.abs().max().item())
        assert (leaf.grad.double() - double.grad).abs().max().item() <= tolerance * scale


def relative_error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def settled(**options) -> tuple[TuckerConv2d, torch.Tensor]:
    """A layer whose next call repeats the last one, and its input."""
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 20, 3, (4, 17), padding=1, **options).eval()
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert layer._memory.settled.call is not None or not kegfast.build_info()["native"]
    return layer, x


def three_convolutions(layer: TuckerConv2d, x: torch.Tensor) -> torch.Tensor:
    """What the layer stands for."""
    with torch.no_grad():
        return layer.to_sequential()(x)
