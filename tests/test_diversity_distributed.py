"""The diversity loss over two processes equals one process with the joined batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kegfast import distributed, functional

CASES = [
    ("l1", "sqeuclidean", "mean", 40),
    ("l1", "euclidean", "mean", 7),
    ("sqeuclidean", "sqeuclidean", "sum", 9),
    ("cosine", "sqeuclidean", "mean", 40),
    ("cosine", "euclidean", "mean", 5),
    ("l2", "sqeuclidean", "mean", 1),  # fewer features than ranks
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


def worker(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        compare_cases(rank)
        compare_ddp(rank)
        plain_loss_in_ddp(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)


def test_alone_it_is_the_plain_loss():
    noises, samples, _ = batch(7)
    assert torch.equal(
        distributed.diversity_loss(noises, samples), functional.diversity_loss(noises, samples)
    )


def test_euclidean_is_refused():
    with pytest.raises(ValueError, match="metric must be one of"):
        distributed.diversity_loss(torch.ones(2, 2), torch.ones(2, 2), metric="euclidean")
