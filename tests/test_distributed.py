"""The diversity loss over two processes equals one process with the joined batch."""

import math

import torch
import two_processes
from torch import nn

from kegfast import distributed, functional

CASES = [
    ("l1", "sqeuclidean", "mean", 40),
    ("l1", "euclidean", "mean", 7),
    ("sqeuclidean", "sqeuclidean", "sum", 9),
    ("cosine", "sqeuclidean", "mean", 40),
    ("cosine", "euclidean", "mean", 5),
    ("l2", "sqeuclidean", "mean", 1),  # fewer features than ranks
    ("euclidean", "sqeuclidean", "mean", 40),
    ("euclidean", "euclidean", "sum", 1),
]


def batch(features, sizes=(60, 33)):
    torch.manual_seed(0)
    noises, samples = torch.randn(sum(sizes), 6).double(), torch.randn(sum(sizes), features).double()
    samples[4] = 0
    return noises, samples, sizes


def compare_cases(rank):
    for metric, noise_metric, reduction, features in CASES:
        options = {"metric": metric, "noise_metric": noise_metric, "reduction": reduction, "log": True}
        noises, samples, sizes = batch(features)
        mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        whole = noises.clone().requires_grad_(), samples.clone().requires_grad_()
        exact = functional.diversity_loss(*whole, **options)
        exact_gradients = torch.autograd.grad(exact, whole)
        local = noises[mine].clone().requires_grad_(), samples[mine].clone().requires_grad_()
        loss = distributed.diversity_loss(*local, **options, averaged=False)
        torch.testing.assert_close(loss, exact)
        gradients = torch.autograd.grad(loss, local)
        torch.testing.assert_close(gradients, tuple(g[mine] for g in exact_gradients))


def ring_hazards(rank):
    """Single precision at an offset, with points that coincide across ranks; then one number too large."""
    torch.manual_seed(3)
    noises, samples = torch.randn(40, 6), 100 + 0.01 * torch.randn(40, 30)
    samples[25], noises[25] = samples[3], noises[3]
    mine = slice(20 * rank, 20 * rank + 20)
    whole = noises.double().requires_grad_(), samples.double().requires_grad_()
    exact = torch.autograd.grad(functional.diversity_loss(*whole, metric="euclidean"), whole)
    local = noises[mine].requires_grad_(), samples[mine].requires_grad_()
    loss = distributed.diversity_loss(*local, metric="euclidean", averaged=False)
    for got, want in zip(torch.autograd.grad(loss, local), exact, strict=True):
        assert (got - want[mine]).abs().max() <= 1e-6 * want.abs().max()
    samples[0, 0] = math.inf
    local = noises[mine].requires_grad_(), samples[mine].requires_grad_()
    loss = distributed.diversity_loss(*local, metric="euclidean")
    assert loss.isnan()
    assert all(g.isnan().all() for g in torch.autograd.grad(loss, local))


def compare_ddp(rank):
    torch.manual_seed(1)
    noises = torch.randn(60, 6)
    generator = nn.Linear(6, 40)
    exact = functional.diversity_loss(noises, generator(noises))
    exact_gradient = torch.autograd.grad(exact, generator.weight)[0]
    mine = noises[rank * 30 : (rank + 1) * 30]
    replica = nn.parallel.DistributedDataParallel(generator)
    loss = distributed.diversity_loss(mine, replica(mine))
    loss.backward()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(generator.weight.grad, exact_gradient)


def plain_loss_in_ddp(rank):
    """The local loss is an ordinary term of a DDP step: replicas end with the mean of their gradients."""
    torch.manual_seed(2)
    noises = torch.randn(60, 6)
    generator = nn.Linear(6, 40)
    halves = [noises[:30], noises[30:]]
    losses = [functional.diversity_loss(half, generator(half)) for half in halves]
    exact = torch.autograd.grad(sum(losses) / 2, generator.weight)[0]
    replica = nn.parallel.DistributedDataParallel(generator)
    functional.diversity_loss(halves[rank], replica(halves[rank])).backward()
    torch.testing.assert_close(generator.weight.grad, exact)


def worker(rank):
    compare_cases(rank)
    ring_hazards(rank)
    compare_ddp(rank)
    plain_loss_in_ddp(rank)


def test_two_processes_equal_one(tmp_path):
    two_processes.run(worker, tmp_path)


def test_alone_it_is_the_plain_loss():
    noises, samples, _ = batch(7)
    assert torch.equal(
        distributed.diversity_loss(noises, samples), functional.diversity_loss(noises, samples)
    )
