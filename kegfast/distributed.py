"""The diversity loss over the joined batch of all ranks of a torch.distributed group (torchrun)."""

import torch
import torch.distributed as dist
from torch import Tensor

from kegfast import functional, reference
from kegfast.check import expected
from kegfast.diversity import once

METRICS = ("l1", "sqeuclidean", "l2", "cosine")


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
    its own samples and their gradient have, and the noises. All of that happens in the forward pass, so
    that no exchange can cross those of DistributedDataParallel in the backward pass.

    Args:
        noises: (B_local, nz) this rank's noises; batches may differ between ranks, nz may not.
        samples: (B_local, ...) this rank's samples.
        metric: as there, but not "euclidean", whose root ties all features of a pair together.
        noise_metric, reduction, log: as there, the same on every rank.
        group: the ranks; None for all. Without torch.distributed the batch is the whole.
        averaged: multiply the gradients by the number of ranks, because DistributedDataParallel averages
            the gradients of its replicas where this loss asks for their sum. False for the plain gradient.

    Returns:
        The same scalar on every rank.

    Raises:
        TypeError, ValueError: as there.
    """
    if metric not in METRICS:
        raise ValueError(expected("metric", f"one of {', '.join(map(repr, METRICS))}", metric))
    options = {"metric": metric, "noise_metric": noise_metric, "reduction": reduction, "log": log}
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return functional.diversity_loss(noises, samples, **options)
    metric = "sqeuclidean" if metric == "l2" else metric
    functional.check_diversity(noises, samples, metric, noise_metric, reduction)
    z, x = (t.reshape(len(t), -1).to(_wide(t.dtype)) for t in (noises, samples))
    factor = 1.0
    alone = torch.zeros_like(x[:, :1])
    if metric == "cosine":  # half the squared distance of rows of norm 1
        alone = (x.norm(dim=1, keepdim=True) == 0).to(x.dtype)
        x = torch.where(alone == 1, 0, x / x.masked_fill(alone == 1, 1).norm(dim=1, keepdim=True))
        factor, metric = x.shape[1] / 2, "sqeuclidean"
    exponent, batch = _JointExponent.apply(z, x, alone, metric, noise_metric, factor, averaged, group)
    if reduction == "sum":
        exponent = exponent * int(batch) ** 2
    value = exponent if log else exponent.exp()
    return value.to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype is torch.float64 else torch.float32


class _JointExponent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, noises, samples, alone, metric, noise_metric, factor, averaged, group):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        ctx.save_for_backward(noises, samples)
        features = samples.shape[1]
        sizes = _gather_sizes(len(samples), samples.device, ranks, group)
        shares = [features * (r + 1) // ranks - features * r // ranks for r in range(ranks)]
        joined = _gather_rows(torch.cat((noises, alone.to(noises.dtype)), 1), sizes, group)
        noises, alone = joined[:, :-1], joined[:, -1].double()
        share = _swap(samples.split(shares, 1), [(size, shares[rank]) for size in sizes], group)
        share = torch.cat(share)  # (B, D / ranks)

        wanted = ctx.needs_input_grad[:2]
        with torch.enable_grad():
            z = noises.detach().requires_grad_(wanted[0])
            x = share.requires_grad_(wanted[1])
            exponent = z.new_zeros((), dtype=torch.float64)
            if x.shape[1]:
                options = {"metric": metric, "noise_metric": noise_metric, "log": True}
                weight = factor * x.shape[1] / features
                exponent = exponent + functional.diversity_loss(z, x, **options).double() * weight
            if rank == 0 and alone.any():  # rows of norm 0 are at distance 1, not 1/2, of the others
                weights = reference.pair_distance(z.double(), noise_metric)
                exponent = exponent - (weights @ alone).sum() / len(z) ** 2
        leaves = [leaf for leaf, want in zip((z, x), wanted, strict=True) if want]
        found = iter(_gradients(exponent, leaves))
        scale = ranks if averaged else 1
        start = sum(sizes[:rank])
        ctx.gradients = [None, None]
        if wanted[0]:
            gradient = next(found)
            dist.all_reduce(gradient, group=group)
            ctx.gradients[0] = gradient[start : start + sizes[rank]] * scale
        if wanted[1]:
            back = _swap(next(found).split(sizes), [(sizes[rank], width) for width in shares], group)
            ctx.gradients[1] = torch.cat(back, 1) * scale
        total = exponent.detach().clone()
        dist.all_reduce(total, group=group)
        batch = torch.tensor(sum(sizes))
        ctx.mark_non_differentiable(batch)
        return total, batch

    @staticmethod
    def backward(ctx, grad, _):
        with torch.no_grad():
            scaled = [None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
        return *once(scaled, grad, *ctx.saved_tensors), *[None] * 6


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
