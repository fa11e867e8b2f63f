"""Random diversity losses, with their gradients, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, LAYOUTS, PLACES, SEEDS, running

import kegfast
from kegfast.functional import diversity_loss
from kegfast.ops import diversity, reference


@given(
    batch=st.one_of(st.integers(1, 40), st.integers(50, 140)),
    shape=st.tuples(*map(st.integers, (1, 1, 1), (9, 9, 9))),
    width=st.one_of(st.integers(1, 20), st.sampled_from([31, 62, 63, 130])),
    metrics=st.tuples(
        st.sampled_from(list(diversity.METRICS)), st.sampled_from(list(diversity.NOISE_METRICS))
    ),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    ties=st.booleans(),
    dtype=DTYPES,
    layout=st.sampled_from(list(LAYOUTS)),
    labels=st.sampled_from([0, 0, 1, 3]),
    place=PLACES,
    seed=SEEDS,
)
@settings(max_examples=150)
def test_values_and_gradients(batch, shape, width, metrics, scale, ties, dtype, layout, labels, place, seed):
    rng = torch.Generator().manual_seed(seed)
    noises, samples = (
        torch.randn(size, generator=rng, dtype=torch.float64) for size in ((batch, width), (batch, *shape))
    )
    samples = (samples * 2).round() if ties else samples
    noises, samples = noises.to(dtype), LAYOUTS[layout]((samples * scale).to(dtype))
    groups = torch.randint(labels, (batch,), generator=rng) if labels else None

    def found(dtype, compute):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (noises, samples)]
        loss = compute(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    options = dict(zip(("metric", "noise_metric"), metrics, strict=True), log=True, labels=groups)
    with running(place):
        got = found(dtype, lambda *t: diversity_loss(*t, **options))
    with kegfast.backend("reference"):
        want = found(torch.float64, lambda *t: diversity_loss(*t, **options))
    # float32's rounding of sums over the batch; half types round their gradients once
    inside = 1e-11 if dtype is torch.float64 else 3e-6
    for x, exact in zip(got, want, strict=True):
        assert x.shape == exact.shape
        last_digit = 0 if x.dim() == 0 else torch.finfo(dtype).eps
        bound = (inside + last_digit) * exact.abs().max() + steepness(noises, samples, x, metrics[0], inside)
        beyond = x.isinf() & (x.sign() == exact.sign()) & (exact.abs() + bound > torch.finfo(x.dtype).max)
        off = (torch.where(beyond, exact, x.double()) - exact).abs().max()
        bound += torch.finfo(x.dtype).smallest_normal + alike(noises, samples, x)
        assert off <= bound, (off / bound, x.shape)


def alike(noises, samples, x) -> float:
    """What equal samples' distance, or its gradient, may be off: their mean is rounded as float64 is."""
    error = 2.0**-51 * samples.double().abs().max().item()
    weight = reference.pair_distance(noises.double(), "sqeuclidean").max().item() + 1
    return weight * (error if x.shape == samples.shape else error**2)


def steepness(noises, samples, x, metric, inside) -> float:
    """What rounding may cost where the distance is itself a difference: the cosine's, of rows of norm 1."""
    if metric != "cosine" or x.shape == noises.shape:
        return 0.0 if metric != "cosine" else inside
    weight = reference.pair_distance(noises.double(), "sqeuclidean").mean().item() + 1
    if x.dim() == 0:
        return inside * weight
    norms = samples.double().flatten(1).norm(dim=1)
    return inside * weight / len(samples) / norms[norms > 0].min().item() if bool((norms > 0).any()) else 0.0
