"""Spending one budget over all layers: error tables from one HOSVD each, then a Lagrangian path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kegfast.decomposition.decompose import DOUBLE_UNTIL, Metric, whiten
from kegfast.decomposition.factors import Side

Rank = tuple[Side, Side]
Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Cost of ranks (in, out), vectorized; a side without a factor is given as 0."""


class Option(NamedTuple):
    """One way to run a layer; `rank` None is the dense layer."""

    rank: Rank | None
    cost: float
    error: float


@dataclass
class Table:
    """Every option of one layer."""

    ranks: np.ndarray  # (n, 2) in and out rank, 0 for a side without a factor; (0, 0) is the dense layer
    costs: np.ndarray  # (n,)
    errors: np.ndarray  # (n,) squared, in the metric that all layers share

    @cached_property
    def hull(self) -> np.ndarray:
        """Indices of the options that the Lagrangian path walks on, by rising cost."""
        return _lower_hull(self.costs, self.errors)

    def option(self, index: int) -> Option:
        in_rank, out_rank = (int(side) or None for side in self.ranks[index])
        rank = (in_rank, out_rank) if in_rank or out_rank else None
        return Option(rank, float(self.costs[index]), float(self.errors[index]))

    def scaled(self, factor: float) -> "Table":
        """The same options with errors that count `factor` times as much."""
        return replace(self, errors=self.errors * factor)

    def capped(self, rank: Rank) -> "Table":
        """The options with no rank above the pair's; a side that it leaves without a factor stays without.

        Where there is none, the dense layer is the only option, or the cheapest where that is none either.
        """
        if not self.ranks[:, 1].any():  # a matrix has one rank
            rank = min(side for side in rank if side), None
        limits = np.array([side or 0 for side in rank])
        below = ((self.ranks <= limits) & ((self.ranks == 0) == (limits == 0))).all(axis=1)
        dense, cheapest = ~self.ranks.any(axis=1), self.costs == self.costs.min()
        fits = next(rows for rows in (below, dense, cheapest) if rows.any())
        return Table(self.ranks[fits], self.costs[fits], self.errors[fits])

    def dearest(self) -> Option:
        """The option that costs most, of those the one with the least error."""
        return self.option(int(np.lexsort((self.errors, -self.costs))[0]))


def tabulate(
    weight: Tensor,  # (K, C, kh, kw) or (K, C)
    cost: Cost,
    dense_cost: float,
    *,
    metric: Metric | None = None,
    step: int = 1,
) -> Table:
    """Cost and exact HOSVD error of every rank pair that is cheaper than the dense layer.

    Args:
        weight: the layer's weight.
        cost: cost of an array of rank pairs.
        dense_cost: cost of the layer as it is.
        metric: what an error costs; None is the squared error of the weight.
        step: only multiples of it (and full ranks) are options, so that ranks fit the kernels.
    """
    ranks, errors = _hosvd_errors(whiten(weight, metric))
    if step > 1:
        sides = np.array([weight.shape[1], weight.shape[0]])
        fits = ((ranks % step == 0) | (ranks == sides)).all(axis=1)
        ranks, errors = ranks[fits], errors[fits]
    costs = cost(ranks[:, 0], ranks[:, 1]).astype(np.float64)
    cheaper = costs < dense_cost
    ranks = np.concatenate([ranks[cheaper], [[0, 0]]])
    costs = np.append(costs[cheaper], dense_cost)
    errors = np.append(np.maximum(errors[cheaper], 0), 0.0)
    return Table(ranks, costs, errors)


def settled(rank: Rank | None, cost: float) -> Table:
    """The table of a layer whose ranks are no longer open."""
    row = np.array([[side or 0 for side in rank or (None, None)]])
    return Table(row, np.array([cost]), np.zeros(1))


def _hosvd_errors(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All rank pairs of a weight and the squared error of its truncated HOSVD at each."""
    outputs, inputs = weight.shape[:2]
    if weight[0, 0].numel() == 1:
        matrix = weight.flatten(1)
        small = matrix if outputs <= inputs else matrix.T
        tail = _tail(torch.linalg.eigvalsh(_gram(small)).clamp_min(0).flip(0).double())
        ranks = np.arange(1, len(tail) + 1)
        return np.stack([ranks, np.zeros_like(ranks)], 1), tail
    left = torch.linalg.eigh(_gram(weight.flatten(1)))
    right = torch.linalg.eigh(_gram(weight.transpose(0, 1).flatten(1)))
    core = torch.einsum("ki,kc...->ic...", left.eigenvectors.flip(1).to(weight), weight)
    core = torch.einsum("cj,ic...->ij...", right.eigenvectors.flip(1).to(weight), core)
    energy = core.double().flatten(2).square().sum(2).cpu().numpy()  # (K, C), by falling importance
    both = energy.sum() - energy.cumsum(0).cumsum(1)
    r2, r1 = np.meshgrid(np.arange(1, outputs + 1), np.arange(1, inputs + 1), indexing="ij")
    pairs = [np.stack([r1.ravel(), r2.ravel()], 1)]
    errors = [both.ravel()]
    for side, channels, spectrum in ((0, inputs, energy.sum(0)), (1, outputs, energy.sum(1))):
        alone = np.zeros((channels, 2), dtype=np.int64)
        alone[:, side] = np.arange(1, channels + 1)
        pairs.append(alone)
        errors.append(_tail(torch.from_numpy(spectrum)))
    return np.concatenate(pairs), np.concatenate(errors)


def _gram(matrix: Tensor) -> Tensor:
    """matrix matrix^T, in float64 unless that would be slow."""
    wide = matrix.double() if matrix.numel() <= DOUBLE_UNTIL else matrix
    return wide @ wide.T


def _tail(squares: Tensor) -> np.ndarray:
    """What is left of a spectrum after its first 1, 2, ... entries."""
    values = squares.cpu().numpy()
    rest: np.ndarray = values.sum() - values.cumsum()
    return rest


def _lower_hull(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the convex hull of least error, by rising cost and falling error."""
    order = np.lexsort((errors, costs))
    best = np.minimum.accumulate(errors[order])
    falls = np.append(True, best[1:] < best[:-1])
    hull: list[int] = []
    for i in order[falls]:
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            turn = (errors[b] - errors[a]) * (costs[i] - costs[a])
            if turn < (errors[i] - errors[a]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(int(i))
    return np.array(hull)


def allocate(tables: Mapping[str, Table], budget: float) -> dict[str, Option]:
    """The option of each layer that spends at most `budget` in all for the least total error.

    The steepest step of all hulls comes first: each prefix of that order is optimal for its own cost
    (one Lagrange multiplier). What is left of the budget goes to options off the hulls.

    Raises:
        ValueError: not even the cheapest options fit.
    """
    chosen = {name: int(table.hull[0]) for name, table in tables.items()}
    left = budget - sum(tables[name].costs[index] for name, index in chosen.items())
    if left < 0:
        raise ValueError(f"budget must be at least {budget - left:.6g}, the cheapest, got {budget:.6g}")
    steps = []
    for name, table in tables.items():
        costs, errors = table.costs[table.hull], table.errors[table.hull]
        slopes = (errors[:-1] - errors[1:]) / (costs[1:] - costs[:-1])
        steps += [(-slope, name, i) for i, slope in enumerate(slopes, start=1)]
    full = set()
    for _, name, i in sorted(steps):
        table = tables[name]
        extra = table.costs[table.hull[i]] - table.costs[chosen[name]]
        if name in full or extra > left:
            full.add(name)
            continue
        chosen[name] = int(table.hull[i])
        left -= extra
    _fill(tables, chosen, left)
    return {name: tables[name].option(index) for name, index in chosen.items()}


def _fill(tables: Mapping[str, Table], chosen: dict[str, int], left: float) -> None:
    """Spends the rest: the affordable option that removes most error, until there is none."""
    while True:
        gain, name, index = 0.0, "", 0
        for candidate, table in tables.items():
            now = chosen[candidate]
            errors = np.where(table.costs <= table.costs[now] + left, table.errors, np.inf)
            best = int(errors.argmin())
            if table.errors[now] - errors[best] > gain:
                gain, name, index = table.errors[now] - errors[best], candidate, best
        if not name:
            return
        left -= tables[name].costs[index] - tables[name].costs[chosen[name]]
        chosen[name] = index
