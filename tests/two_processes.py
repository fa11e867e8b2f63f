"""Runs a function in two processes of torch.distributed (gloo)."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kegfast.training.processes import leave


def run(work: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Calls work(rank, *arguments) in both, which meet at a file in the folder."""
    mp.spawn(_process, (work, f"file://{folder / 'meeting'}", arguments), nprocs=2)


def _process(rank: int, work: Callable[..., None], meeting: str, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()  # neither leaves while the other still reads
    leave()
    threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"left behind, they abort the process: {threads}"
