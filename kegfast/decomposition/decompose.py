"""Factors of one weight: Tucker-2 by higher-order orthogonal iteration, an SVD for a matrix."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kegfast._util.extras import extra
from kegfast.decomposition.factors import Factors, Side, reconstruct
from kegfast.decomposition.ranks import GRAM_FROM, explicit_rank

DOUBLE_UNTIL = 1 << 20
"""Weights of at most this many entries are decomposed in float64."""


TENSORLY_UNTIL = 1 << 18
"""Larger weights are decomposed by their Gram matrices."""


SKETCH_FROM = 2048
"""From so many rows and columns the first quarter of an SVD is found without the rest."""
ITERATIONS = 6


@dataclass(frozen=True)
class Metric:
    """What an error of the weight costs: tr(output dW inputs dW^T), averaged over kernel taps."""

    inputs: Tensor  # (C, C) second moments of the layer's input channels
    output: Tensor  # (K, K) second moments of the loss's gradient in its output channels

    @cached_property
    def roots(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A square root of each (root root^T is the matrix) and its inverse."""
        return _root(self.inputs), _root(self.output)


def factorize(
    weight: Tensor,  # (K, C, kh, kw) or (K, C)
    rank: tuple[Side, Side],
    metric: Metric | None = None,
) -> Factors:
    """Decomposes a weight along its channels.

    A spatial weight gets a Tucker-2 decomposition (`last core first`). A matrix of rank (r, None) or
    (None, r) gets its truncated SVD; of rank (r1, r2), the Tucker-2 form U core V, in which the paper
    writes its MLPs.

    Args:
        weight: any float dtype and device; small weights are decomposed in float64.
        rank: (in_rank, out_rank), None for a side without a factor.
        metric: what to minimize instead of the squared error of the weight.

    Returns:
        Factors in the weight's dtype and on its device.

    Raises:
        ValueError: a rank outside 1..channels, or a weight that is not finite.
    """
    return Decomposition(weight, metric).at(rank)


class Decomposition:
    """`factorize` at several ranks: what does not depend on them is computed once."""

    def __init__(self, weight: Tensor, metric: Metric | None = None):
        self._weight, self._metric = weight.detach(), metric
        if not bool(self._weight.isfinite().all()):
            raise ValueError("weight must be finite, got NaN or infinite values")

    @cached_property
    def _target(self) -> Tensor:
        return whiten(self._weight, self._metric)

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return _svd(self._target.flatten(1))

    def _svd_to(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD, or its start where the matrix is large, the rank small, the whole not yet known."""
        sides = self._target.shape[:2]
        if "_svd" in vars(self) or min(sides) < SKETCH_FROM or rank > min(sides) // 4:
            return self._svd
        return _leading_svd(self._target.flatten(1), rank)

    def at(self, rank: tuple[Side, Side]) -> Factors:
        """The factors of one pair of ranks."""
        in_rank, out_rank = explicit_rank(rank, self._weight.shape[1], self._weight.shape[0])
        matrix = self._weight[0, 0].numel() == 1
        if matrix and (in_rank is None or out_rank is None):
            factors = _low_rank(self._target, self._svd_to(in_rank or out_rank or 0), in_rank, out_rank)
        else:
            factors = _tucker2(self._target, in_rank, out_rank)
        if self._metric is not None:
            (_, inputs), (_, output) = self._metric.roots
            factors = _unwhiten(factors, inputs.to(self._target), output.to(self._target))
        return factors.to(self._weight)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (K, C) -> (K, n), (n,), (n, C)
    """The thin SVD; of a large matrix by its smaller Gram matrix in float64, which is quicker.

    The matrix is projected on the left vectors, so truncated products are the best of their rank; only what
    is below 1e-8 of the largest singular value, less than a float32 weight can tell, comes in any order.
    """
    rows, columns = matrix.shape
    if min(rows, columns) <= GRAM_FROM:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    if rows > columns:
        u, s, v = _svd(matrix.T)
        return v.T, s, u.T
    wide = matrix.double()
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1).to(matrix)
    projected = u.T @ matrix
    s = projected.norm(dim=1)
    return u, s, projected / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:  # as _svd, n >= rank
    """The start of the thin SVD, by iterations of a random subspace (Halko, Martinsson and Tropp 2011).

    What it leaves out is at most 0.4 % more than the best of that rank, where all singular values are nearly
    alike; where they fall, no more.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    width = rank + max(32, rank // 8)
    shape, dtype = (matrix.shape[1], width), matrix.dtype
    basis = matrix @ torch.randn(shape, generator=generator, dtype=dtype, device=matrix.device)
    for _ in range(ITERATIONS):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis)[0])
    basis = torch.linalg.qr(basis)[0]
    u, s, v = _svd(basis.T @ matrix)
    return basis @ u, s, v


def _low_rank(matrix: Tensor, svd: tuple[Tensor, Tensor, Tensor], in_rank: Side, out_rank: Side) -> Factors:
    shape = matrix.shape[2:]
    u, s, v = svd
    rank = min(in_rank or out_rank or 0, len(s))
    root = s[:rank].sqrt()  # shared between both factors, so that neither is badly scaled
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    if in_rank is not None:
        return Factors(right, left.reshape(*left.shape, *shape), None)
    return Factors(None, right.reshape(*right.shape, *shape), left)


def _tucker2(weight: Tensor, in_rank: Side, out_rank: Side) -> Factors:
    ranks = {mode: rank for mode, rank in ((0, out_rank), (1, in_rank)) if rank is not None}
    if not weight.any():  # every subspace is as good as any other
        eye = torch.eye(max(weight.shape[:2]), dtype=weight.dtype, device=weight.device)
        bases = {mode: eye[: weight.shape[mode], :rank] for mode, rank in ranks.items()}
        core = weight[: out_rank or None, : in_rank or None]
    else:
        core, bases = _hooi(weight, ranks)
    first = bases[1].T.contiguous() if 1 in bases else None
    return Factors(first, core.contiguous(), bases.get(0))


def _hooi(weight: Tensor, ranks: dict[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The one place that calls tensorly; it takes a full SVD a step, which large weights do not stand."""
    if weight.numel() > TENSORLY_UNTIL:
        return _hooi_by_gram(weight, ranks)
    with extra("compress"):
        import tensorly
        from tensorly.decomposition import partial_tucker
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (core, factors), _ = partial_tucker(
            tensor=weight, rank=list(ranks.values()), modes=list(ranks), init="svd", random_state=0
        )  # the state fills up factors with more columns than a weight has directions
    return core, dict(zip(ranks, factors, strict=True))


def _hooi_by_gram(weight: Tensor, ranks: dict[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """HOSVD and two sweeps of HOOI, by eigenvectors of the small Gram matrices."""
    bases = {mode: _leading(weight, mode, rank) for mode, rank in ranks.items()}
    for _ in range(2 if len(ranks) > 1 else 0):  # on one side the HOSVD is already the optimum
        for mode, rank in ranks.items():
            others = {other: basis for other, basis in bases.items() if other != mode}
            bases[mode] = _leading(_project(weight, others), mode, rank)
    return _project(weight, bases), bases


def _leading(weight: Tensor, mode: int, rank: int) -> Tensor:
    unfolding = weight.transpose(0, mode).flatten(1)
    vectors: Tensor = torch.linalg.eigh(unfolding @ unfolding.T).eigenvectors
    return vectors.flip(1)[:, :rank]


def _project(weight: Tensor, bases: dict[int, Tensor]) -> Tensor:
    for mode, basis in bases.items():
        weight = torch.tensordot(basis, weight, ([0], [mode])).transpose(0, mode)
    return weight


def _root(moments: Tensor) -> tuple[Tensor, Tensor]:  # (C, C) -> (C, C), (C, C)
    """A square root and its inverse of a positive semidefinite matrix, slightly damped."""
    moments = moments.double() if moments.numel() <= DOUBLE_UNTIL else moments
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    floor = values.clamp_min(0).mean() * 1e-4
    values = values.clamp_min(floor if floor > 0 else 1.0)
    return vectors * values.sqrt(), (vectors * values.rsqrt()).T


def whiten(weight: Tensor, metric: Metric | None) -> Tensor:
    """The weight in a basis where the metric is the plain squared error."""
    dtype = torch.float64 if weight.numel() <= DOUBLE_UNTIL else torch.float32
    weight = weight.detach().to(dtype)
    if metric is None:
        return weight
    (inputs, _), (output, _) = metric.roots
    return torch.einsum("ki,kc...,cj->ij...", output.to(weight), weight, inputs.to(weight))


def _unwhiten(factors: Factors, inputs: Tensor, output: Tensor) -> Factors:
    """Factors of a whitened weight, in the original basis."""
    first, core, last = factors
    if first is None:
        core = torch.einsum("rc...,cj->rj...", core, inputs)
    if last is None:
        core = torch.einsum("ki,kr...->ir...", output, core)
    return Factors(None if first is None else first @ inputs, core, None if last is None else output.T @ last)


def relative_error(weight: Tensor, factors: Factors) -> float:
    """||weight - reconstruction|| / ||weight|| of the factors as stored, computed in float64."""
    exact = weight.detach().double()
    norm = float(exact.norm())
    stored = factors.each(lambda part: part.detach().double())
    return float((exact - reconstruct(stored)).norm()) / norm if norm else 0.0
