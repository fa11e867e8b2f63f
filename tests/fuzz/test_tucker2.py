"""Random Tucker-2 convolutions, forward and backward, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, LAYOUTS, PLACES, ROUNDOFF, SEEDS, check, running

from kegfast.functional import tucker_conv2d
from kegfast.ops import reference

# Of magnitudes: what three sums of some hundred products each, in float32, may lose.
SHARE = 24 * 2.0**-24
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8, 16, 32, 48, 64, 96]))


@st.composite
def geometries(draw) -> tuple:
    """(N, C, H, W), (R1, R2, K), kernel and (stride, padding, dilation); some are worth two threads."""
    pairs = [draw(st.tuples(one, one)) for one in map(st.integers, (1, 1, 0, 1), (5, 3, 4, 2))]
    kernel, stride, padding, dilation = pairs
    if draw(st.booleans()):  # what most layers are, Winograd's among them
        kernel, stride, padding, dilation = (3, 3), draw(st.sampled_from([(1, 1), (2, 2)])), (1, 1), (1, 1)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = [draw(st.integers(n, n + 20)) for n in least]
    return (
        (draw(st.integers(0, 6)), draw(WIDTHS), *size),
        (draw(WIDTHS), draw(WIDTHS), draw(WIDTHS)),
        kernel,
        (stride, padding, dilation),
    )


@given(
    geometry=geometries(),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3),
    place=PLACES,
    scale=st.sampled_from([1.0, 1.0, 1e-4, 1e-6, 100.0]),
    options=st.tuples(*[st.booleans()] * 3),
    seed=SEEDS,
)
@settings(max_examples=200)
def test_values_and_gradients(geometry, dtype, layouts, place, scale, options, seed):
    images, (r1, r2, k), kernel, rest = geometry
    relu, has_bias, recompute = options
    rng = torch.Generator().manual_seed(seed)
    shapes = images, (r1, images[1], 1, 1), (r2, r1, *kernel), (k, r2, 1, 1), (k,)
    fans = 1 / scale**2, images[1], r1 * kernel[0] * kernel[1], r2, 1 / scale**2
    x, *weights, bias = (
        (torch.randn(shape, generator=rng, dtype=torch.float64) / fan**0.5).to(dtype)
        for shape, fan in zip(shapes, fans, strict=True)
    )
    x, weights[1] = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](weights[1])
    leaves = [t.detach().requires_grad_() for t in (x, *weights, bias)]
    leaves = leaves if has_bias else [*leaves[:4], None]
    activation = "relu" if relu else None
    with running(place):
        with torch.no_grad():
            alone = tucker_conv2d(*leaves, *rest, activation)
        y = tucker_conv2d(*leaves, *rest, activation, recompute)
        grad = LAYOUTS[layouts[2]](torch.randn(y.shape, generator=rng, dtype=torch.float64).to(dtype))
        found = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)

    # bfloat16 is rounded between the convolutions, forwards and backwards
    share = 4 * ROUNDOFF[dtype] if dtype is torch.bfloat16 else SHARE if dtype is not torch.float64 else 1e-14
    flows = grad * (y > 0) if relu else grad  # near 0 the signs of y may differ
    (want, wanted), (sizes, spread) = (
        float64(leaves, rest, flows, of) for of in (lambda t: t, lambda t: t.abs())
    )
    want = want.relu() if relu else want
    for got in (y, alone):
        check(got.detach(), want, sizes, share)
    if "pixels expanded" in layouts:  # running sums of one number over and over: their errors have one sign
        share += y[:, 0].numel() / 4 * ROUNDOFF[torch.float32]
    for got, exact, size in zip(found, wanted, spread, strict=True):
        check(got, exact, size, share)


def float64(leaves, rest, grad, of):
    """The convolution without its activation, and its gradients, of what `of` makes of all numbers."""
    wide = [None if t is None else of(t.detach().double()).requires_grad_() for t in leaves]
    y = reference.tucker_conv2d(*wide, *rest, None)
    return y.detach(), torch.autograd.grad(y, [t for t in wide if t is not None], of(grad.double()))
