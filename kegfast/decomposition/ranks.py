"""How many channels a layer keeps: analytic EVBMF, a share, an energy threshold, or explicit ranks."""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kegfast._util.check import expected
from kegfast._util.extras import extra
from kegfast.decomposition.factors import Side

RankRule = str | float | tuple[Side, Side]
RankRules = RankRule | Mapping[str, RankRule]
GRAM_FROM = 256
"""Matrices of more rows and columns are taken apart by the eigenvectors of their smaller Gram matrix."""
EVBMF_RULES = ("evbmf", "evbmf-exact")
Spectra = tuple[np.ndarray, np.ndarray]


class EVBMF(NamedTuple):
    """The global solution of empirical variational Bayesian matrix factorization."""

    rank: int
    noise_variance: float
    singular_values: np.ndarray  # (rank,) after shrinkage


def evbmf(singular_values: np.ndarray, rows: int, columns: int, *, exact: bool = False) -> EVBMF:
    """Solves fully observed EVBMF from a matrix's singular values.

    Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of Fully-observed Variational
    Bayesian Matrix Factorization", JMLR 14 (2013): a component survives if its singular value
    exceeds `sigma sqrt(M (1 + tau)(1 + alpha / tau))`, `alpha = L / M`, `tau` the root of
    `Phi(tau) + Phi(tau / alpha)`, and the noise variance `sigma^2` minimizes the free energy,
    which is a function of that one number.

    Args:
        singular_values: (min(rows, columns),) in descending order.
        rows: rows of the matrix; either order works, L is the smaller of the two.
        columns: columns of the matrix.
        exact: False is the common practice, whose ranks published results use: the paper's
            approximation `tau = 2.5129 sqrt(alpha)` and one bounded search for `sigma^2`, which may
            end in a local minimum. True solves for `tau` and finds the global minimum. On the same
            weights the two differ by one rank at times.

    Returns:
        The rank (0 for a matrix that is all noise, or all zero), the estimated noise variance and
        the shrunk singular values.
    """
    small, large = sorted((rows, columns))  # L <= M
    values = np.asarray(singular_values, dtype=np.float64)[:small]
    if not values.any():
        return EVBMF(0, 0.0, values[:0])
    alpha = small / large
    tau = _detection_root(alpha) if exact else 2.5129 * math.sqrt(alpha)
    x_detect = (1 + tau) * (1 + alpha / tau)
    search = _global_minimum if exact else _bounded_minimum
    lower, upper = _variance_bounds(values, small, large, x_detect)
    free_energy = partial(_free_energy, values**2 / large, alpha, x_detect)
    variance = search(free_energy, lower, upper) if lower < upper else upper
    kept = values[values > math.sqrt(large * variance * x_detect)]
    ratio = 1 - (small + large) * variance / kept**2
    shrunk = kept / 2 * (ratio + np.sqrt(ratio**2 - 4 * small * large * (variance / kept**2) ** 2))
    return EVBMF(len(kept), variance, shrunk)


def _detection_root(alpha: float) -> float:
    """The zero of Phi(tau) + Phi(tau / alpha), Phi(z) = log(1 + z) / z - 1/2."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    guess = 2.5129 * math.sqrt(alpha)
    with extra("compress"):
        from scipy.optimize import brentq
    return float(brentq(lambda tau: phi(tau) + phi(tau / alpha), guess / 8, guess * 8, xtol=1e-13))


def _variance_bounds(values: np.ndarray, small: int, large: int, x_detect: float) -> tuple[float, float]:
    """The interval that holds the noise variance of least free energy."""
    squares = values**2
    upper = squares.sum() / (small * large)
    most = max(math.ceil(small / (1 + small / large)) - 1, 0)  # more components are never optimal
    tail = squares[most:]
    lower = max(tail[0] / (large * x_detect), tail.mean() / large)
    return float(min(max(lower, upper * 1e-12), upper)), float(upper)


def _free_energy(scaled: np.ndarray, alpha: float, x_detect: float, variance: float) -> float:
    x = np.maximum(scaled / variance, 1e-300)
    seen = x[x > x_detect]
    center = seen - (1 + alpha)
    tau = (center + np.sqrt(center**2 - 4 * alpha)) / 2
    gain = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float(np.sum(x - np.log(x)) + np.sum(gain))


def _bounded_minimum(free_energy: Callable[[float], float], lower: float, upper: float) -> float:
    with extra("compress"):
        from scipy.optimize import minimize_scalar
    return float(minimize_scalar(free_energy, bounds=(lower, upper), method="bounded").x)


def _global_minimum(free_energy: Callable[[float], float], lower: float, upper: float) -> float:
    with extra("compress"):
        from scipy.optimize import minimize_scalar
    # A kink wherever a component passes the threshold, with a minimum beside each: a grid finds the
    # lowest, a bounded search refines it.
    grid = np.geomspace(lower, upper, 1024)
    best = int(np.argmin([free_energy(point) for point in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    options = {"xatol": 1e-9 * upper}
    refined = minimize_scalar(free_energy, bounds=bounds, method="bounded", options=options)
    return float(min((refined.x, grid[best]), key=free_energy))


def spectra(
    weight: Tensor,  # (K, C, kh, kw) or (K, C)
) -> Spectra:
    """Singular values of the input and of the output unfolding, in float64, descending."""
    weight = weight.detach().to("cpu", torch.float64)
    output = _singular_values(weight.flatten(1))
    if weight[0, 0].numel() == 1:  # a matrix, of which the other unfolding is the transpose
        return output, output
    return _singular_values(weight.transpose(0, 1).flatten(1)), output


def _singular_values(matrix: Tensor) -> np.ndarray:
    rows, columns = matrix.shape
    if rows > columns:
        return _singular_values(matrix.T)
    if columns > 4 * rows or rows > GRAM_FROM:  # of the Gram matrix, exact enough for ranks and far quicker
        squares: Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
        return squares.clamp_min(0).sqrt().flip(0).numpy()
    values: Tensor = torch.linalg.svdvals(matrix)
    return values.numpy()


def layer_rank(
    weight: Tensor,  # (K, C, kh, kw) or (K, C)
    rule: RankRule,
    values: Spectra | None = None,
) -> tuple[Side, Side]:
    """The (in_rank, out_rank) that a rule gives one layer.

    Args:
        weight: the layer's weight. A matrix (a Linear, a 1x1 convolution) has one rank only; every
            rule but an explicit pair then gives `(rank, None)`, the two factors of its SVD.
        rule: "evbmf" or "evbmf-exact" (see `evbmf`); a float in (0, 1], the share of the channels
            that each side keeps; "energy=E", the least ranks whose unfoldings keep the share E of
            the squared norm; or an explicit (in_rank, out_rank), where None leaves a side without a
            factor.
        values: the weight's `spectra`, if they are at hand.

    Raises:
        ValueError: a rule that is none of these, or a rank outside 1..channels.
    """
    outputs, inputs = weight.shape[:2]
    if isinstance(rule, tuple | list):
        return explicit_rank((*rule,), inputs, outputs)
    columns = weight[0, 0].numel()
    matrix = columns == 1
    if _is_share(rule):
        share = float(rule)
        if matrix:
            return max(1, round(share * min(inputs, outputs))), None
        return max(1, round(share * inputs)), max(1, round(share * outputs))
    in_values, out_values = values or spectra(weight)
    if rule in EVBMF_RULES:
        exact = rule == "evbmf-exact"
        out_rank = evbmf(out_values, outputs, inputs * columns, exact=exact).rank
        # Rank 0 says that the weight looks like noise; a layer still needs one channel.
        if matrix:
            return max(1, out_rank), None
        in_rank = evbmf(in_values, inputs, outputs * columns, exact=exact).rank
        return max(1, in_rank), max(1, out_rank)
    energy = _energy(rule)
    if matrix:
        return energy_rank(out_values, energy), None
    return energy_rank(in_values, energy), energy_rank(out_values, energy)


def energy_rank(singular_values: np.ndarray, energy: float) -> int:
    """The least rank whose singular values keep the share `energy` of the squared norm."""
    kept = np.cumsum(np.asarray(singular_values, dtype=np.float64) ** 2)
    if kept[-1] == 0.0:
        return 1
    return min(int(np.searchsorted(kept, energy * kept[-1] * (1 - 1e-12))) + 1, len(kept))


def explicit_rank(rank: tuple[Side, Side], inputs: int, outputs: int) -> tuple[Side, Side]:
    """Checks an explicit (in_rank, out_rank) against the layer's channels."""
    if len(rank) != 2 or (rank[0] is None and rank[1] is None):
        raise ValueError(expected("rank", "(in_rank, out_rank), at most one of them None", rank))
    for side, given, channels in (("in_rank", rank[0], inputs), ("out_rank", rank[1], outputs)):
        if given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= channels:
            raise ValueError(expected(side, f"an int from 1 to {channels}", given))
    return rank[0], rank[1]


def check_rule(rule: RankRule) -> None:
    """Raises ValueError or TypeError for a rule that no layer could follow."""
    if isinstance(rule, tuple | list):
        if len(rank := tuple(rule)) != 2:
            raise ValueError(expected("rank", "a pair (in_rank, out_rank)", rank))
    elif not _is_share(rule) and rule not in EVBMF_RULES:
        _energy(rule)


def rule_for(rules: RankRules, name: str) -> RankRule | None:
    """The rule of a layer: the exact name first, then the first glob pattern that matches."""
    if not isinstance(rules, Mapping):
        return rules
    if name in rules:
        return rules[name]
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def _is_share(rule: object) -> bool:
    if isinstance(rule, bool) or not isinstance(rule, float | int):
        return False
    if not (isinstance(rule, float) and 0 < rule <= 1):
        raise ValueError(expected("rank", "a float in (0, 1], the share of channels to keep", rule))
    return True


def _energy(rule: object) -> float:
    form = '"evbmf", "energy=0.9", a float in (0, 1] or a pair (in_rank, out_rank)'
    if not isinstance(rule, str):
        raise TypeError(expected("rank", form, rule))
    kind, _, value = rule.partition("=")
    try:
        energy = float(value)
    except ValueError:
        energy = 0.0
    if kind != "energy" or not 0 < energy <= 1:
        raise ValueError(expected("rank", form, rule))
    return energy
