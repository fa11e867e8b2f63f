"""Random soft targets, with their gradients, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, PLACES, SEEDS, running

from kegfast.functional import soft_target
from kegfast.ops import reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "columns apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows apart": lambda x: x.repeat_interleave(3, 0)[::3],
    "transposed": lambda x: x.T.contiguous().T,
    "one row": lambda x: x[:1].expand(x.shape),
    "one class": lambda x: x[:, :1].expand(x.shape),
}


@given(
    size=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 300)), st.tuples(st.integers(100, 300), st.just(700))
    ),
    scales=st.tuples(*[st.sampled_from([1e-6, 1e-2, 1.0, 10.0, 1000.0])] * 2),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
    temperature=st.floats(0.05, 1000.0),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    place=PLACES,
    seed=SEEDS,
)
@settings(max_examples=150)
def test_values_and_gradients(size, scales, offset, temperature, dtype, layouts, place, seed):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        LAYOUTS[layout]((offset + scale * torch.randn(size, generator=rng, dtype=torch.float64)).to(dtype))
        for layout, scale in zip(layouts, scales, strict=True)
    )
    leaf = student.detach().requires_grad_()
    with running(place):
        loss = soft_target(leaf, teacher, temperature)
        (gradient,) = torch.autograd.grad(loss, leaf)
    wide = student.detach().double().requires_grad_()
    want = reference.soft_target(wide, teacher.double(), temperature)
    (slope,) = torch.autograd.grad(want, wide)

    # The divergence is a difference of sums of size one and of exponents (x - max) / T, T^2 times that; half
    # types are computed in float64 and rounded once.
    eps = torch.finfo(dtype).eps
    half = dtype in (torch.float16, torch.bfloat16)
    reach = max(
        (t.double() / temperature - t.double().amax(1, keepdim=True) / temperature).abs().max().item()
        for t in (student, teacher)
    )
    inside = 0.0 if half else 4 * eps * (1 + reach) * temperature**2
    overflows = want.item() > torch.finfo(dtype).max
    assert overflows or abs(loss.item() - want.item()) <= 2 * eps * want.item() + inside + 1e-7 * half
    share = (wide / temperature).softmax(1) + (teacher.double() / temperature).softmax(1)
    bound = eps * slope.abs() + (0.0 if half else 4 * eps) * (1 + reach) * share * temperature / size[0]
    # The kernel's exponentials end at e^-87, 1.65e-38; the gradient is their difference times T / B.
    least = torch.finfo(dtype).smallest_normal + 1.65e-38 * temperature / size[0]
    assert ((gradient.double() - slope).abs() <= bound + least).all()
