"""What the experiments of distillation share: a seed's cells and checkpoints, and the spread over seeds."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kegfast.experiments.ledger import Ledger, spread
from kegfast.training.loop import mix

log = logging.getLogger(__name__)


class Trial:
    """The part of an experiment that one seed decides.

    Args:
        seed: Of all its draws.
        ledger: Where its cells are kept.
        progress: Show bars on a terminal.
        name: Before the name of every cell and file; "seed <seed>" when None.
    """

    def __init__(self, seed: int, ledger: Ledger, progress: bool = False, name: str | None = None):
        self.seed, self.ledger, self.progress = seed, ledger, progress
        self.name = f"seed {seed}" if name is None else name

    def shared(self) -> "Trial":
        """The trial of what all seeds have in common."""
        return Trial(0, self.ledger, self.progress, name="shared")

    def cell(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a cell, computed where it is missing."""
        log.info("%s: %s", self.name, name)
        return self.ledger.cell(f"{self.name}: {name}", compute)

    def resumed(self, name: str) -> dict[str, Any]:
        """Options with which `train` and `distill` continue what this trial's file of a name holds."""
        file = f"{self.name}-{name}.pt".replace(" ", "-")
        checkpoint = self.ledger.path.parent / file
        return {"seed": self.seed, "checkpoint": checkpoint, "resume": True, "progress": self.progress}


def trials(
    output: str | Path, part: str, seeds: Sequence[int], config: Any, progress: bool = False
) -> list[Trial]:
    """A trial for each seed of a part of an experiment; `output`/`part`.json holds its cells."""
    ledger = Ledger(Path(output) / f"{part}.json", asdict(config))
    return [Trial(seed, ledger, progress) for seed in seeds]


def spreads(found: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread over the trials of what each of them found, by name."""
    return {name: spread([values[name] for values in found]) for name in found[0]}


def beginning(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """An untrained model that the seed alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def part(dataset: TensorDataset, share: float, seed: int) -> TensorDataset:
    """The same number of samples of every class, drawn by the seed."""
    samples, labels = dataset.tensors
    if share == 1.0:
        return dataset
    generator = torch.Generator().manual_seed(mix(seed, 2))
    order = torch.randperm(len(labels), generator=generator)
    classes = labels.unique()
    each = round(share * len(labels) / len(classes))
    chosen: list[Tensor] = [order[labels[order] == k][:each] for k in classes]
    return TensorDataset(*(x[torch.cat(chosen)] for x in (samples, labels)))
