"""The processes that torchrun starts: joining them, and what they do together."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if dist.is_available():
    # Default arguments of its functions hold the default group. The first optimizer would import it when
    # there is one, and the group outlive destroy_process_group; gloo's threads then abort the process at
    # its end.
    import torch.distributed.nn.functional


def place() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def joined() -> Iterator[int]:
    """Joins the processes that torchrun has started, and leaves them; gives the rank, 0 without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        leave()


def leave() -> None:
    """Ends the default group and its threads.

    A DistributedDataParallel may hold the group from a reference cycle. Collected as its last holder, it
    would wait for gloo's threads under the interpreter's lock, which these may wait for.
    """
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def main_first() -> Iterator[None]:
    """The block on rank 0, then on all others, which find the files that it left."""
    rank, world = place()
    if rank:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def agreed(value: bool) -> bool:
    """Rank 0's value, on all ranks."""
    if place()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def replicated(student: nn.Module) -> nn.Module:
    """The student, wrapped so that all processes train the same one."""
    return student if place()[1] == 1 else DistributedDataParallel(student)
