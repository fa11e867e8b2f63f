"""torch's data sets and loaders as sources of samples."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.inputs import Inputs, concat, take, unpack
from kegfast._util.inputs import count as count_of


class MapStyle(Protocol):
    """What torch asks of a data set whose items are numbered."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class DatasetSource:
    """Random items of a map-style data set."""

    def __init__(self, dataset: MapStyle):
        if len(dataset) == 0:
            raise ValueError(expected("source", "a data set with samples", "an empty one"))
        self.dataset = dataset

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        index = torch.randint(len(self.dataset), (check.count("n", n),)).tolist()
        return unpacked(torch.utils.data.default_collate([self.dataset[i] for i in index]))


class LoaderSource:
    """Batches of a DataLoader, cut to the size asked for, pass after pass.

    The loader's order is its own: a resumed run begins a new pass.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self._batches: Iterator[Any] = iter(())
        self._left: tuple[Inputs, Tensor | None] | None = None

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        samples, labels = [], []
        while n > 0:
            part, part_labels = self._left or self._next()
            samples.append(take(part, slice(n)))
            labels.append(None if part_labels is None else part_labels[:n])
            rest = take(part, slice(n, None)), None if part_labels is None else part_labels[n:]
            self._left = rest if count_of(rest[0]) else None
            n -= count_of(samples[-1])
        known = [part for part in labels if part is not None]
        return concat(samples), torch.cat(known) if len(known) == len(labels) else None

    def _next(self) -> tuple[Inputs, Tensor | None]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.loader)
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(expected("source", "a DataLoader with batches", "an empty one"))
        return unpacked(batch)


def unpacked(batch: Any) -> tuple[Inputs, Tensor | None]:
    """(samples, labels) of a collated batch."""
    samples, labels = unpack("source", batch)
    return samples, None if labels is None else as_labels("the source's labels", labels)


def as_labels(name: str, labels: Any) -> Tensor:
    """Classes as int64."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.dtype is torch.bool:
        raise TypeError(expected(name, "integers", labels))
    return labels.long()
