"""torch's global generators, which whoever seeded them wants to find as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Draws in the block leave the global generators, CUDA's where it is in use, as they were before it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield
