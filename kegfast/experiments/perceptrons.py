"""Networks of two hidden layers on MNIST: how the parts of Hinton's experiment train, teach and count."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kegfast
from kegfast.data.catalog import ENTRIES, load_entry
from kegfast.data.splits import DataInfo, Splits
from kegfast.distillation import InMemory
from kegfast.distillation.sources import Source
from kegfast.experiments.trial import Trial, beginning
from kegfast.training import train
from kegfast.training.loop import mix

CLASSES = 10


@dataclass(frozen=True)
class Budget:
    """How every network learns.

    Attributes:
        batch_size: Samples of a step.
        lr: Highest learning rate.
        temperature: Of the soft targets.
        alpha: Weight of the soft targets against the labels; 1 uses none.
        amp: Train in bfloat16 where that is safe.
    """

    batch_size: int = 256
    lr: float = 2e-3
    temperature: float = 4.0
    alpha: float = 1.0
    amp: bool = True


Config = TypeVar("Config", bound=Budget)


class Learning(Generic[Config]):
    """The networks of one trial; those of one width and number begin alike."""

    def __init__(self, trial: Trial, config: Config, splits: Splits):
        self.trial, self.config, self.splits = trial, config, splits

    def errors(self, name: str, make: Callable[[str], nn.Module]) -> int:
        """The cell of this name: errors of the network that is made for it."""
        return self.trial.cell(name, lambda: errors(make(name), self.splits))

    def beginning(self, units: int, number: int = 0) -> nn.Module:
        return beginning(lambda: network(units), mix(self.trial.seed, number))

    def trained(
        self,
        name: str,
        model: nn.Module,
        epochs: int,
        samples: TensorDataset | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """A network that learnt from the labels alone, of the training set when no samples are given."""
        config = self.config
        train(
            model,
            self.splits.train if samples is None else samples,
            epochs=epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=0.0,
            augment=augment,
            amp=config.amp,
            **self.trial.resumed(name),
        )
        return model

    def taught(
        self, name: str, student: nn.Module, teacher: nn.Module, steps: int, source: Source | None = None
    ) -> nn.Module:
        """Distilled from a source, the training set when None."""
        config = self.config
        kegfast.distill(
            student,
            teacher,
            self.transfer_set() if source is None else source,
            steps=steps,
            batch_size=config.batch_size,
            lr=config.lr,
            temperature=config.temperature,
            alpha=config.alpha,
            amp=config.amp,
            label=name,
            **self.trial.resumed(name),
        )
        return student

    def steps(self, epochs: int) -> int:
        """Steps that visit as many samples as passes over the training set."""
        return epochs * (len(self.splits.train) // self.config.batch_size)

    def transfer_set(self, kept: list[int] | None = None) -> InMemory:
        """The training samples of some classes, all when None."""
        samples, labels = self.splits.train.tensors
        chosen = slice(None) if kept is None else torch.isin(labels, torch.tensor(kept))
        return InMemory(samples[chosen], labels[chosen])


def load(root: str | Path | None) -> Splits:
    """MNIST as images of 28 x 28, from `root`, from OpenML when None."""
    entry = ENTRIES["mnist"]
    info = entry.info
    flat = DataInfo(info.name, info.num_classes, (1, 28, 28), info.mean, info.std)
    return load_entry(replace(entry, info=flat), None if root is None else Path(root))


def network(units: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, units),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(units, units),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(units, CLASSES),
    )


def errors(model: nn.Module, splits: Splits) -> int:
    samples, labels = splits.test.tensors
    return wrong(logits(model, samples), labels)


def logits(model: nn.Module, samples: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part) for part in samples.split(1000)])


def wrong(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) != labels).sum())
