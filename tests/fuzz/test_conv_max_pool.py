"""Random convolutions with their pooling against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, LAYOUTS, PLACES, ROUNDOFF, SEEDS, check, running

from kegfast.ops import reference
from kegfast.ops.conv_max_pool import conv_max_pool2d

PAIRS = {
    1: st.tuples(st.integers(1, 5), st.integers(1, 5)),
    0: st.tuples(st.integers(0, 3), st.integers(0, 3)),
}


@given(
    sizes=st.tuples(*map(st.integers, (0, 1, 1, 1, 1), (3, 12, 40, 40, 70))),
    windows=st.tuples(PAIRS[1], PAIRS[1], PAIRS[0], PAIRS[1], PAIRS[1], PAIRS[0]),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    place=PLACES,
    options=st.tuples(*[st.booleans()] * 3),
    seed=SEEDS,
)
@settings(max_examples=120)
def test_values_gradients_and_refusals(sizes, windows, dtype, layouts, place, options, seed):
    n, c, h, w, k = sizes
    kernel, *geometry = windows
    relu, has_bias, training = options
    rng = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for shape in ((n, c, h, w), (k, c, *kernel), (k,))
    )
    x, weight = (LAYOUTS[layout](t) for layout, t in zip(layouts, (x, weight), strict=True))
    given = [t.requires_grad_(training) for t in (x.detach(), weight.detach(), bias)][: 3 if has_bias else 2]
    given += [None] * (3 - len(given))
    activation = "relu" if relu else None

    def exact(of):
        wide = [None if t is None else of(t.detach().double()) for t in given]
        return reference.conv_max_pool2d(*wide, *geometry, activation)

    try:
        want = exact(lambda t: t)
    except RuntimeError:  # what torch refuses
        with running(place), pytest.raises(ValueError, match="must be"):
            conv_max_pool2d(*given, *geometry, activation)
        return
    with running(place):
        y = conv_max_pool2d(*given, *geometry, activation)
    # The maximum of magnitudes: what any pixel of the window may have lost. A sum rounds once for each of its
    # terms, and where those are alike, as of equal channels, all the same way.
    terms = weight[0].numel() + has_bias
    half = dtype in (torch.bfloat16, torch.float16)
    share = ROUNDOFF[dtype] if half else terms * ROUNDOFF[dtype]
    check(y.detach(), want, exact(torch.abs), share)
    if training:
        y.sum().backward()
        assert all(t.grad.isfinite().all() for t in given if t is not None)
