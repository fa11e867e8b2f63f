"""The diversity loss over the joined batch of all ranks of a torch.distributed group (torchrun)."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kegfast import functional
from kegfast.ops import reference
from kegfast.ops._once import once
from kegfast.ops.diversity import ONCE


def diversity_loss(
    noises: Tensor,  # (B_local, nz)
    samples: Tensor,  # (B_local, ...)
    *,
    metric: functional.Metric = "l1",
    noise_metric: functional.NoiseMetric = "sqeuclidean",
    reduction: str = "mean",
    log: bool = False,
    group: dist.ProcessGroup | None = None,
    averaged: bool = True,
) -> Tensor:  # ()
    """`kegfast.functional.diversity_loss` of the batch that all ranks hold together.

    Each rank takes a share of the features for the whole batch: it sends and receives as many numbers as
    its own samples and their gradient have, and the noises. "euclidean", whose root ties all features of a
    pair together, goes round a ring instead: at each of its steps, one fewer than ranks, every rank hands
    on one rank's noises and samples. All of that happens in the forward pass, so that no exchange can
    cross those of DistributedDataParallel in the backward pass.

    Args:
        noises: (B_local, nz) this rank's noises; batches may differ between ranks, nz may not.
        samples: (B_local, ...) this rank's samples.
        metric, noise_metric, reduction, log: as there, the same on every rank.
        group: the ranks; None for all. Without torch.distributed the batch is the whole.
        averaged: multiply the gradients by the number of ranks, because DistributedDataParallel averages
            the gradients of its replicas where this loss asks for their sum. False for the plain gradient.

    Returns:
        The same scalar on every rank.

    Raises:
        TypeError, ValueError: as there.
    """
    options: dict[str, Any] = {
        "metric": metric,
        "noise_metric": noise_metric,
        "reduction": reduction,
        "log": log,
    }
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return functional.diversity_loss(noises, samples, **options)
    kind = functional.check_diversity(noises, samples, metric, noise_metric, reduction, log)
    z, x = (t.reshape(len(t), -1).to(_wide(t.dtype)) for t in (noises, samples))
    if kind == "euclidean":
        evaluate = partial(_round_a_ring, noise_metric=noise_metric, group=group)
        return _finish(z, x, evaluate, reduction, log, averaged, group)
    factor = 1.0
    alone = torch.zeros_like(x[:, :1])
    if kind == "cosine":  # half the squared distance of rows of norm 1
        alone = (x.norm(dim=1, keepdim=True) == 0).to(x.dtype)
        x = torch.where(alone == 1, 0, x / x.masked_fill(alone == 1, 1).norm(dim=1, keepdim=True))
        factor, kind = x.shape[1] / 2, "sqeuclidean"
    evaluate = partial(
        _by_features, alone=alone, metric=kind, noise_metric=noise_metric, factor=factor, group=group
    )
    return _finish(z, x, evaluate, reduction, log, averaged, group)


def _finish(z, x, evaluate, reduction, log, averaged, group) -> Tensor:
    ranks = dist.get_world_size(group) if averaged else 1
    exponent, batch = _JointExponent.apply(z, x, evaluate, ranks)
    if reduction == "sum":
        exponent = exponent * int(batch) ** 2
    value = exponent if log else exponent.exp()
    return value.to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype is torch.float64 else torch.float32


# An evaluation takes this rank's noises and samples and which gradients are wanted, and returns the joint
# exponent (float64), the size of the joint batch, and this rank's gradients.
Evaluation = tuple[Tensor, int, list[Tensor | None]]


class _JointExponent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, noises, samples, evaluate, factor):
        ctx.save_for_backward(noises, samples)
        total, batch, gradients = evaluate(noises, samples, ctx.needs_input_grad[:2])
        ctx.gradients = [None if g is None else g * factor for g in gradients]
        batch = torch.tensor(batch)
        ctx.mark_non_differentiable(batch)
        return total, batch

    @staticmethod
    def backward(ctx, grad, _):
        with torch.no_grad():
            scaled = [None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
        return *once(ONCE, scaled, grad, *ctx.saved_tensors), None, None


def _by_features(noises, samples, wanted, *, alone, metric, noise_metric, factor, group) -> Evaluation:
    """Each rank evaluates its share of the features for the joint batch."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    features = samples.shape[1]
    sizes = _gather_sizes(len(samples), samples.device, ranks, group)
    shares = [features * (r + 1) // ranks - features * r // ranks for r in range(ranks)]
    joined = _gather_rows(torch.cat((noises, alone.to(noises.dtype)), 1), sizes, group)
    noises, alone = joined[:, :-1], joined[:, -1].double()
    share = torch.cat(  # (B, D / ranks)
        _swap(samples.split(shares, 1), [(size, shares[rank]) for size in sizes], group)
    )

    with torch.enable_grad():
        z = noises.detach().requires_grad_(wanted[0])
        x = share.requires_grad_(wanted[1])
        exponent = z.new_zeros((), dtype=torch.float64)
        if x.shape[1]:
            options: dict[str, Any] = {"metric": metric, "noise_metric": noise_metric, "log": True}
            weight = factor * x.shape[1] / features
            exponent = exponent + functional.diversity_loss(z, x, **options).double() * weight
        if rank == 0 and alone.any():  # rows of norm 0 are at distance 1, not 1/2, of the others
            weights = reference.pair_distance(z.double(), noise_metric)
            exponent = exponent - (weights @ alone).sum() / len(z) ** 2
    leaves = [leaf for leaf, want in zip((z, x), wanted, strict=True) if want]
    found = iter(_gradients(exponent, leaves))
    gradients: list[Tensor | None] = [None, None]
    if wanted[0]:
        gradient = next(found)
        dist.all_reduce(gradient, group=group)
        gradients[0] = gradient.split(sizes)[rank]
    if wanted[1]:
        back = _swap(next(found).split(sizes), [(sizes[rank], width) for width in shares], group)
        gradients[1] = torch.cat(back, 1)
    total = exponent.detach().clone()
    dist.all_reduce(total, group=group)
    return total, sum(sizes), gradients


def _round_a_ring(noises, samples, wanted, *, noise_metric, group) -> Evaluation:
    """Every rank compares its own samples with those of each rank in turn, euclidean."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = _gather_sizes(len(samples), samples.device, ranks, group)
    width = noises.shape[1]
    visitors = torch.cat((noises.to(torch.promote_types(noises.dtype, samples.dtype)), samples), 1)
    # Centered: the gradient is a difference of sums, which an offset must not drown.
    middle = [noises.mean(0), samples.mean(0)]
    own = [noises - middle[0], samples - middle[1]]
    total = samples.new_zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(t) if want else None for t, want in zip(own, wanted, strict=True)]
    for step in range(ranks):
        if step + 1 < ranks:
            following, pending = _pass_on(visitors, sizes[(rank - step - 1) % ranks], group)
        theirs = (
            visitors[:, :width].to(noises.dtype) - middle[0],
            visitors[:, width:].to(samples.dtype) - middle[1],
        )
        d, w = _distance(own[1], theirs[1]), _distance(own[0], theirs[0])
        slopes = _inverse(w), _inverse(d)  # of the norms
        if noise_metric == "sqeuclidean":
            slopes, w = (torch.full_like(w, 2 / width), slopes[1]), w.square() / width
        total += (w.double() * d).sum()
        for gradient, t, y, factor in zip(
            gradients, own, theirs, (d * slopes[0], w * slopes[1]), strict=True
        ):
            if gradient is not None:
                factor = factor.to(t.dtype)
                gradient += factor.sum(1, keepdim=True) * t - factor @ y
        if step + 1 < ranks:
            for request in pending:
                request.wait()
            visitors = following
    dist.all_reduce(total, group=group)
    pairs = sum(sizes) ** 2
    poison = 1 + 0 * total  # NaN where any number is not finite
    return (
        -total / pairs * poison,
        sum(sizes),
        [None if g is None else g * (-2 / pairs * poison).to(g.dtype) for g in gradients],
    )


def _distance(x: Tensor, y: Tensor) -> Tensor:  # (N, D), (M, D) -> (N, M)
    """Norms of all differences: by differences, not products, so that coincident rows are at exactly 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is: coincident points pull in no direction."""
    return torch.where(d == 0, 0, 1 / d)


def _pass_on(block: Tensor, rows: int, group) -> tuple[Tensor, list]:
    """Starts to send `block` to the next rank and to receive `rows` rows of the one before."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (
        r if group is None else dist.get_global_rank(group, r)
        for r in ((rank + 1) % ranks, (rank - 1) % ranks)
    )
    received = block.new_empty(rows, block.shape[1])
    exchange = [
        dist.P2POp(dist.isend, block.contiguous(), after, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    return received, dist.batch_isend_irecv(exchange)


def _gradients(exponent: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not leaves or not exponent.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(exponent, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _gather_sizes(size: int, device: torch.device, ranks: int, group) -> list[int]:
    sizes = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.split(1)), torch.tensor([size], device=device), group=group)
    return sizes.tolist()


def _gather_rows(rows: Tensor, sizes: list[int], group) -> Tensor:  # (B_local, n) -> (B, n)
    """All ranks' rows, in the order of the ranks; padded on the way, as collectives want equal sizes."""
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _swap(parts, shapes: list[tuple[int, int]], group) -> list[Tensor]:
    """Sends part r to rank r; returns what each rank sent, of these shapes."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    counts = [rows * columns for rows, columns in shapes]
    received = sent.new_empty(sum(counts))
    dist.all_to_all_single(received, sent, counts, [part.numel() for part in parts], group=group)
    return [flat.view(shape) for flat, shape in zip(received.split(counts), shapes, strict=True)]
