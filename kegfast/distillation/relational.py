"""Relational distillation (Park et al. 2019): the geometry of a batch instead of its points.

The two models' features may have any, and different, numbers of dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kegfast._util import check
from kegfast.distillation.precision import wide, without_autocast

_CHUNK_ELEMENTS = 1 << 17
"""Entries of `rkd_angle`'s largest buffer: the five or so that it needs stay in a core's cache."""


def rkd_distance(
    student: Tensor,  # (B, ...)
    teacher: Tensor,  # (B, ...)
) -> Tensor:
    """Match pairwise distances (equations 5 to 7 of the paper); the paper weights it by 25.

    The mean over all ordered pairs i != j of `huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)`, `mu`
    being a model's mean distance over these pairs and `huber(d)` `d^2 / 2` up to 1 and `|d| - 1/2`
    beyond. The paper sums; the mean makes the weight independent of the batch size.

    All distances follow from one Gram matrix in float64, whose memory does not grow with B^2 times the
    feature size: at 128 x 64 as fast as `torch.cdist`'s pairwise form, at 256 x 512 five times. The compiled
    pairwise kernel (`kegfast.functional.diversity_loss`) gives sums over pairs alone; Huber needs each.

    Args:
        student: (B, ...) features or logits, at least two samples.
        teacher: (B, ...) of the same samples; the other dimensions may differ.

    Returns:
        A scalar, in float32 or wider. A batch whose points all coincide has distances of zero.

    Raises:
        TypeError, ValueError: No floating-point tensors, fewer than two samples, or batches of different
            size.
    """
    student, teacher = _vectors(student, teacher, 2)
    with without_autocast(student):  # the Gram matrix needs the digits
        ours, theirs = _relative_distances(student), _relative_distances(teacher.detach())
    return F.huber_loss(ours, theirs.to(ours.dtype))


def rkd_angle(
    student: Tensor,  # (B, ...)
    teacher: Tensor,  # (B, ...)
) -> Tensor:
    """Match the angles of all triangles (equations 8 to 10 of the paper); it weights this by 50.

    The mean over all ordered triples of distinct i, j, k of `huber(cos_s(i, j, k) - cos_t(i, j, k))`,
    the cosine being that of the angle at j. Coinciding points have the cosine 0. All cosines and
    their gradient follow from the Gram matrix, corner by corner, so that memory does not grow with
    B^2 times the feature size. The gradient is of first order only, and the student's.

    Args:
        student: (B, ...) features or logits, at least three samples.
        teacher: (B, ...) of the same samples; the other dimensions may differ.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError, ValueError: No floating-point tensors, fewer than three samples, or batches of different
            size.
    """
    student, teacher = _vectors(student, teacher, 3)
    with without_autocast(student):
        return _AngleLoss.apply(student, teacher.detach())


def _relative_distances(x: Tensor) -> Tensor:  # (B, D) -> (B * (B - 1),)
    """Distances of all ordered pairs of different rows, divided by their mean."""
    distances = _off_diagonal(_distances(_gram(x)).to(x.dtype))
    return distances / distances.mean().clamp(min=torch.finfo(x.dtype).tiny)


def _gram(points: Tensor) -> Tensor:  # (B, D) -> (B, B)
    """Inner products of the centered points, in float64: a short edge is a difference of large products."""
    points = points.double()
    points = points - points.mean(dim=0)
    return points @ points.T


def _distances(gram: Tensor) -> Tensor:  # (B, B) -> (B, B)
    """Zero, with no gradient, where two points are closer than the products' rounding can tell."""
    squares = gram.diagonal()
    both = squares.unsqueeze(1) + squares
    distances = both - 2 * gram
    same = distances <= 8 * torch.finfo(gram.dtype).eps * both
    return distances.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)


def _off_diagonal(x: Tensor) -> Tensor:  # (B, B) -> (B * (B - 1),)
    size = len(x)
    return x.flatten()[1:].view(size - 1, size + 1)[:, :-1].flatten()


class _AngleLoss(torch.autograd.Function):
    """The loss, and with it the gradient, in one pass over the corners j.

    With unit edges e_ij = (s_i - s_j) / d_ij the cosine at j is <e_ij, e_kj>; w_jik is the loss's
    derivative in it. Everything that the gradient takes from a corner is linear in the rows of s,
    so that it sums up to one (B, B) matrix, of which the gradient is the product with s.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        size = len(student)
        ours, theirs = _Corners(student), _Corners(teacher)
        triples = size * (size - 1) * (size - 2)
        total = student.new_zeros(())
        near = student.new_zeros(size, size)  # sum over corners j of p_jik, at (i, k)
        edge = student.new_zeros(size, size)  # sum over k of p_jik, at (i, j)
        turn = student.new_zeros(size, size)  # sum over k of w_jik cos_jik / d_ij^2, at (i, j)
        corners = max(1, _CHUNK_ELEMENTS // size**2)
        for start in range(0, size, corners):
            rows = slice(start, min(start + corners, size))
            cosines = ours.cosines(rows)
            difference = cosines - theirs.cosines(rows).to(cosines.dtype)
            slope = difference.clamp(-1, 1)
            total += (slope * (difference - slope / 2)).sum()
            inverse = ours.inverse[rows]
            turn[:, rows] = ((slope * cosines).sum(dim=2) * inverse.square()).T
            slope *= inverse.unsqueeze(1)
            slope *= inverse.unsqueeze(2)
            edge[:, rows] = slope.sum(dim=2).T
            near += slope.sum(dim=0)
        matrix = near - edge - edge.T + turn + turn.T
        matrix.diagonal().add_(edge.sum(dim=0) - turn.sum(dim=1) - turn.sum(dim=0))
        ctx.save_for_backward((2 / triples) * (matrix @ ours.points))
        return total / triples

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (student_gradient,) = ctx.saved_tensors
        return gradient * student_gradient, None


class _Corners:
    """Cosines of the angles between all pairs of edges that meet in a point."""

    def __init__(self, points: Tensor):  # (B, D)
        self.points = points - points.mean(dim=0)
        self.gram = _gram(points)
        distance = _distances(self.gram).to(points.dtype)
        self.inverse = torch.where(distance > 0, 1 / distance, 0.0)

    def cosines(self, corners: slice) -> Tensor:  # (J, B, B), zero wherever two of i, j, k agree
        gram, inverse = self.gram[corners], self.inverse[corners]  # (J, B)
        square = self.gram.diagonal()[corners]
        result = self.gram - gram.unsqueeze(1)
        result -= gram.unsqueeze(2)
        result += square[:, None, None]
        result = result.to(inverse.dtype)
        result *= inverse.unsqueeze(1)
        result *= inverse.unsqueeze(2)
        result.diagonal(dim1=1, dim2=2).zero_()
        return result


def _vectors(student: Tensor, teacher: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both as (B, D) in float32 or wider."""
    check.batches(2, least, student=student, teacher=teacher)
    return wide(student.flatten(1)), wide(teacher.flatten(1))
