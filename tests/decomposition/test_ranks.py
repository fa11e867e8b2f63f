"""Ranks: EVBMF against its paper, and the rules on top of it."""

import numpy as np
import pytest
import torch

from kegfast.decomposition.ranks import energy_rank, evbmf, layer_rank, rule_for


def low_rank(rows, columns, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    return signal + noise * rng.standard_normal((rows, columns))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(40, 90), (90, 40), (64, 64)])
def test_evbmf_finds_the_rank_and_noise_of_a_planted_matrix(rows, columns, exact):
    values = np.linalg.svd(low_rank(rows, columns, 5, 0.5), compute_uv=False)
    found = evbmf(values, rows, columns, exact=exact)
    assert found.rank == 5
    assert found.noise_variance == pytest.approx(0.25, rel=0.15)
    assert np.all(found.singular_values < values[:5])
    assert np.all(found.singular_values > 0.5 * values[:5])


@pytest.mark.parametrize("exact", [False, True])
def test_evbmf_of_noise_and_of_zeros_is_rank_0(exact):
    noise = np.linalg.svd(np.random.default_rng(1).standard_normal((60, 300)), compute_uv=False)
    assert evbmf(noise, 60, 300, exact=exact).rank == 0
    assert evbmf(np.zeros(8), 8, 9, exact=exact) == (0, 0.0, pytest.approx([]))


def test_evbmf_does_not_depend_on_orientation_or_scale():
    values = np.linalg.svd(low_rank(30, 70, 4, 1.0), compute_uv=False)
    wide, tall = evbmf(values, 30, 70, exact=True), evbmf(values, 70, 30, exact=True)
    assert wide.rank == tall.rank
    scaled = evbmf(values * 1e-4, 30, 70, exact=True)
    assert scaled.rank == wide.rank
    assert scaled.noise_variance == pytest.approx(wide.noise_variance * 1e-8, rel=1e-4)


def test_exact_threshold_is_where_the_gain_becomes_positive():
    """At the threshold x the evidence for a component, the integral of d psi / dx, is zero."""
    from kegfast.decomposition.ranks import _detection_root, _free_energy

    for alpha in (0.1, 0.5, 1.0):
        tau = _detection_root(alpha)
        x = (1 + tau) * (1 + alpha / tau)
        below = _free_energy(np.array([x * (1 - 1e-9)]), alpha, x, 1.0)
        above = _free_energy(np.array([x * (1 + 1e-9)]), alpha, x, 1.0)
        assert above == pytest.approx(below, abs=1e-6)  # the free energy has no jump there
        assert tau == pytest.approx(2.5129 * np.sqrt(alpha), rel=0.05)


def test_one_channel_is_kept_of_noise():
    torch.manual_seed(0)
    in_rank, out_rank = layer_rank(torch.randn(64, 64, 3, 3), "evbmf")
    assert in_rank >= 1
    assert out_rank >= 1


def test_energy_rank_keeps_the_share():
    values = np.sqrt([50.0, 30.0, 15.0, 5.0])
    assert [energy_rank(values, e) for e in (0.5, 0.51, 0.8, 0.95, 0.96, 1.0)] == [1, 2, 2, 3, 4, 4]
    assert energy_rank(np.zeros(4), 0.9) == 1


def test_shares_and_explicit_ranks():
    conv, linear = torch.randn(20, 10, 3, 3), torch.randn(20, 10)
    assert layer_rank(conv, 0.5) == (5, 10)
    assert layer_rank(conv, 0.01) == (1, 1)
    assert layer_rank(linear, 0.5) == (5, None)
    assert layer_rank(torch.randn(20, 10, 1, 1), 0.5) == (5, None)
    assert layer_rank(conv, (3, 20)) == (3, 20)
    assert layer_rank(conv, (None, 4)) == (None, 4)


@pytest.mark.parametrize(
    "rule", ["svd", "energy=2", "energy=", 1.5, 0.0, 3, True, (0, 3), (3, 21), (3,), (None, None), (1.5, 2)]
)
def test_bad_rules_are_named(rule):
    with pytest.raises((ValueError, TypeError), match=r"rank must be"):
        layer_rank(torch.randn(20, 10, 3, 3), rule)


def test_exact_names_come_before_patterns():
    rules = {"conv*": "evbmf", "conv2": (1, 2)}
    assert rule_for(rules, "conv2") == (1, 2)
    assert rule_for(rules, "conv3") == "evbmf"
    assert rule_for(rules, "fc") is None
