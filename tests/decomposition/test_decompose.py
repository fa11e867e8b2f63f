"""Factors of a weight against the dense weight and against optimality."""

import numpy as np
import pytest
import torch

from kegfast.decomposition import decompose
from kegfast.decomposition.decompose import Metric, factorize, relative_error
from kegfast.decomposition.factors import reconstruct
from kegfast.decomposition.ranks import spectra

SHAPES = [(12, 8, 3, 3), (8, 12, 5, 1), (16, 6, 1, 1), (10, 14)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_reconstruct_the_weight(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    for rank in ((shape[1], shape[0]), (shape[1], None), (None, shape[0])):
        factors = factorize(weight, rank)
        assert factors.core.dtype == dtype
        limit = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1.5e-2}[dtype]
        assert relative_error(weight, factors) < limit
        again = factorize(weight, rank)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(factors, again, strict=True))


def test_a_planted_decomposition_is_found():
    torch.manual_seed(0)
    first, core, last = torch.randn(3, 9), torch.randn(4, 3, 3, 3), torch.randn(11, 4)
    weight = torch.einsum("kr,rshw,sc->kchw", last, core, first)
    assert relative_error(weight, factorize(weight, (3, 4))) < 1e-6
    assert relative_error(weight, factorize(weight, (2, 4))) > 1e-2


def test_matrices_get_the_best_low_rank_error():
    torch.manual_seed(0)
    weight = torch.randn(20, 15, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    best = float(values[6:].norm() / values.norm())
    for rank in ((6, None), (None, 6), (6, 6)):
        factors = factorize(weight, rank)
        assert factors.rank == rank
        assert relative_error(weight, factors) == pytest.approx(best, rel=1e-9)


def test_the_error_is_that_of_the_factors_as_stored():
    torch.manual_seed(0)
    weight = torch.randn(12, 8, 3, 3)
    factors = factorize(weight, (5, 6))
    expected = float((weight.double() - reconstruct(factors).double()).norm() / weight.double().norm())
    assert relative_error(weight, factors) == pytest.approx(expected, rel=1e-5)


def test_a_metric_lowers_the_error_that_it_measures():
    torch.manual_seed(0)
    weight = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    inputs, output = torch.randn(10, 10).double(), torch.randn(12, 12).double()
    metric = Metric(inputs.T @ inputs, output.T @ output)

    def cost(factors):
        change = weight - reconstruct(factors)
        return float(torch.einsum("kchw,kl,ldhw,dc->", change, metric.output, change, metric.inputs))

    assert cost(factorize(weight, (4, 5), metric)) < 0.8 * cost(factorize(weight, (4, 5)))
    assert relative_error(weight, factorize(weight, (10, 12), metric)) < 1e-9


def test_zero_weights_have_no_error():
    weight = torch.zeros(6, 5, 3, 3)
    factors = factorize(weight, (2, 3))
    assert factors.rank == (2, 3)
    assert relative_error(weight, factors) == 0.0


def test_weights_that_are_not_finite_are_refused():
    weight = torch.randn(6, 5, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        factorize(weight, (2, 3))


@pytest.mark.parametrize("rank", [(5, 6), (5, None), (None, 6)])
def test_large_weights_take_a_faster_way_to_the_same_error(monkeypatch, rank):
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3) * torch.logspace(0, -2, 24)[:, None, None, None]
    exact = relative_error(weight, factorize(weight, rank))
    monkeypatch.setattr("kegfast.decomposition.decompose.DOUBLE_UNTIL", 10)
    assert relative_error(weight, factorize(weight, rank)) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_matrices_lose_no_more_than_their_svd_says(shape, dtype):
    """Also where the singular values fall by five decades, as those of whitened weights do."""
    torch.manual_seed(0)
    n = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in shape)
    values = torch.logspace(0, -5, n, dtype=torch.float64)
    weight = ((left * values) @ right.T).to(dtype)
    exact = torch.linalg.svdvals(weight.double())
    for rank in (1, 40, 200, 290, n):
        for pair in ((rank, None), (None, rank)):
            best = float(exact[rank:].norm() / exact.norm())
            error = relative_error(weight, factorize(weight, pair))
            assert error <= best * 1.001 + (1e-6 if dtype is torch.float32 else 1e-9)


def test_a_matrix_is_taken_apart_once_for_its_ranks(monkeypatch):
    calls = []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda *args: calls.append(args[0].shape) or original(*args)
    )
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    weight = torch.randn(300, 1200)
    inputs, output = spectra(weight)
    assert calls == [(300, 300)]
    assert inputs is output
    np.testing.assert_allclose(output, torch.linalg.svd(weight.double())[1].numpy(), rtol=1e-9)


@pytest.mark.parametrize("decades", [0.0, 5.0])
def test_a_small_rank_of_a_large_matrix_is_nearly_the_best(decades, monkeypatch):
    monkeypatch.setattr(decompose, "SKETCH_FROM", 512)
    torch.manual_seed(0)
    weight = torch.randn(600, 512)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if decades:
        values = torch.logspace(0, -decades, 512)
        weight = (left * values) @ right
    state = torch.get_rng_state()
    for rank in (20, 128):
        best = float(values[rank:].double().norm() / values.double().norm())
        error = relative_error(weight, factorize(weight, (rank, None)))
        assert best * 0.999 <= error <= best * 1.004
        assert error == relative_error(weight, factorize(weight, (rank, None)))
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(decompose, "_leading_svd", None)
    whole = factorize(weight, (129, None))
    assert relative_error(weight, whole) <= float(values[129:].norm() / values.norm()) * 1.001
