"""Where the samples that a student is taught with come from.

A source is any object with `sample(n) -> (samples, labels)`: samples (n, *sample_shape) in float32, or a
tuple or a dict of such tensors for a model of several inputs; labels (n,) int64, -100 where a sample has
none, or None. It draws from torch's global generator, so that whoever seeds that repeats the draw.
`kegfast.Generators` is one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.files import digest
from kegfast._util.inputs import (
    Inputs,
    as_inputs,
    call,
    concat,
    copied,
    each,
    move,
    split,
    take,
    tensors_in,
)
from kegfast._util.inputs import count as count_of
from kegfast.distillation.datasets import DatasetSource, LoaderSource, as_labels, unpacked
from kegfast.distillation.logit import UNLABELED


@runtime_checkable
class Source(Protocol):
    """What `kegfast.distill` draws from."""

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        """Draw `n` samples and, where known, their labels."""
        ...


def drawn(source: Source, n: int) -> Tensor:  # (n, *sample_shape)
    """Samples without their labels, of a source whose samples are tensors.

    Raises:
        TypeError: they are tuples or mappings.
    """
    samples, _ = source.sample(n)
    if not isinstance(samples, Tensor):
        raise TypeError(expected("source", "of samples that are tensors", samples))
    return samples


class UniformNoise:
    """Independent values, uniform in [low, high).

    Args:
        sample_shape: The shape of one sample.
        low, high: Finite; the defaults cover much of what normalized images take. Variance 1 needs -sqrt(3)
            and sqrt(3).
        device: Where samples are made; torch's default device when None.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        low: float = -1.0,
        high: float = 1.0,
        device: torch.device | str | None = None,
    ):
        check.number("high", high)
        if not check.number("low", low) < high:
            raise ValueError(expected("low", f"a number below high = {high}", low))
        self.sample_shape, self.low, self.high = check.sizes("sample_shape", sample_shape), low, high
        self.device = None if device is None else check.device("device", device)

    def sample(self, n: int) -> tuple[Tensor, None]:
        noise = torch.rand(check.count("n", n), *self.sample_shape, device=self.device)
        return noise.mul_(self.high - self.low).add_(self.low), None


class GaussianNoise:
    """Independent values from N(mean, std^2).

    Args:
        sample_shape: The shape of one sample.
        mean, std: Finite, `std` above 0; the defaults are those of normalized data.
        device: Where samples are made; torch's default device when None.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        mean: float = 0.0,
        std: float = 1.0,
        device: torch.device | str | None = None,
    ):
        self.sample_shape = check.sizes("sample_shape", sample_shape)
        self.mean, self.std = check.number("mean", mean), check.number("std", std, above=0)
        self.device = None if device is None else check.device("device", device)

    def sample(self, n: int) -> tuple[Tensor, None]:
        noise = torch.randn(check.count("n", n), *self.sample_shape, device=self.device)
        return noise.mul_(self.std).add_(self.mean), None


class InMemory:
    """Samples held in memory, drawn with replacement.

    `kegfast.distill` asks the teacher for its answer to each of them once, not at every step, where it
    draws more samples than there are.

    Args:
        samples: (N, *sample_shape), or a tuple or a dict of such tensors for a model of several inputs.
        labels: (N,) integers, or None.
    """

    def __init__(self, samples: Inputs, labels: Tensor | None = None):
        samples = as_inputs("samples", samples)
        if isinstance(samples, Tensor):
            _check_samples(samples, least=1)
        self._size = count_of(samples)
        if self._size == 0:
            raise ValueError(expected("samples", "one sample or more", samples))
        if labels is not None and as_labels("labels", labels).shape != (self._size,):
            raise ValueError(expected("labels", f"of shape ({self._size},)", labels))
        self.samples, self.labels = samples, None if labels is None else labels.long()
        self._answers: tuple[bytes, Any] | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def tensor(self) -> Tensor:
        """The samples, where they are one tensor; TypeError where they are not."""
        if not isinstance(self.samples, Tensor):
            raise TypeError(expected("samples", "a tensor", self.samples))
        return self.samples

    def draw(self, n: int) -> Tensor:
        """Positions of `n` samples, (n,) int64."""
        device = tensors_in(self.samples)[0].device
        return torch.randint(len(self), (check.count("n", n),), device=device)

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        index = self.draw(n)
        return take(self.samples, index), None if self.labels is None else self.labels[index]

    def answers(
        self, teacher: nn.Module, device: torch.device | None = None, batch_size: int = 128
    ) -> Tensor:
        """The teacher's logits for every sample, (N, C), kept until its weights change.

        Args:
            teacher: The model, already in the mode (`eval`) in which it shall answer.
            device: Where it lives; the samples' device when None. The answers lie with the samples.
            batch_size: How many samples it sees at a time; small ones stay in a CPU's caches (ResNet14: 128
                take a third of the time of 1,024).

        Raises:
            TypeError, ValueError: It does not take the samples, or does not answer with one tensor.
        """
        key = digest([repr(teacher), teacher.state_dict()])  # equal only while the model answers the same
        if self._answers is None or self._answers[0] != key:
            with torch.no_grad():
                parts = [self._ask(teacher, part, device) for part in split(self.samples, batch_size)]
            self._answers = key, torch.cat(parts).to(tensors_in(self.samples)[0].device)
        return self._answers[1]

    def _ask(self, teacher: nn.Module, part: Inputs, device: torch.device | None) -> Tensor:
        with check.accepts("source", take(part, slice(1)), "teacher"):
            answer = call(teacher, copied(part) if device is None else move(copied(part), device))
        if not isinstance(answer, Tensor):
            raise TypeError(expected("teacher", "a model that gives logits, one tensor", answer))
        return answer


class Pool(InMemory):
    """`size` samples drawn once, here, from another source; the draw uses torch's global generator.

    Args:
        source: Anything that `as_source` takes.
        size: How many samples.
        batch_size: How many are drawn at a time.
    """

    def __init__(self, source: Any, size: int, batch_size: int = 1024):
        check.counts(size=size, batch_size=batch_size)
        source = as_source(source)
        with torch.no_grad():
            parts = [source.sample(min(batch_size, size - start)) for start in range(0, size, batch_size)]
        samples, labels = zip(*parts, strict=True)
        super().__init__(concat(samples), None if labels[0] is None else torch.cat(labels))


class Noisy:
    """Another source's samples with N(0, std^2) added to every number that is no integer."""

    def __init__(self, source: Any, std: float = 0.1):
        self.source, self.std = as_source(source), check.number("std", std, above=0)

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        samples, labels = self.source.sample(n)
        return each(self._disturbed, samples), labels

    def _disturbed(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if x.is_floating_point() else x


class Augmented:
    """Another source's samples, changed anew at every draw: `Augmented(data, lambda x: random_shift(x, 2))`.

    Args:
        source: Anything that `as_source` takes.
        change: Maps samples (n, *sample_shape), or a tuple or dict of inputs, to as many; labels stay. Its
            draws must come from torch's global generator.
    """

    def __init__(self, source: Any, change: Callable[[Any], Any]):
        if not callable(change):
            raise TypeError(expected("change", "a function of samples", change))
        self.source, self.change = as_source(source), change

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        samples, labels = self.source.sample(n)
        changed, given = self.change(samples), count_of(samples)
        if not isinstance(changed, Tensor | tuple | dict) or count_of(changed) != given:
            raise ValueError(expected("change", f"a function to {given} samples, as it got", changed))
        return changed, labels


class Munge:
    """Unlabeled samples near given ones (MUNGE: Bucila, Caruana and Niculescu-Mizil 2006).

    A sample and its nearest neighbor are drawn; with probability `swap` each value `x` becomes a draw
    from N(neighbor's value, (|x - neighbor's value| / sharpness)^2). The teacher labels
    the result. It multiplies a small data set; nothing is drawn far from it.

    Args:
        samples: (N, *sample_shape), at least two; distances are Euclidean, so scale features alike.
        swap: Probability per value, in [0, 1] (the paper's p).
        sharpness: Above 0; the larger, the closer to the neighbor's value (the paper's s).
    """

    def __init__(self, samples: Tensor, swap: float = 0.5, sharpness: float = 1.0):
        _check_samples(samples, least=2)
        self.samples, self.swap = samples, check.number("swap", swap, least=0, most=1)
        self.sharpness = check.number("sharpness", sharpness, above=0)
        self.neighbors = _nearest(samples.flatten(1))

    def sample(self, n: int) -> tuple[Tensor, None]:
        index = torch.randint(len(self.samples), (check.count("n", n),), device=self.samples.device)
        base, neighbor = self.samples[index], self.samples[self.neighbors[index]]
        moved = neighbor + torch.randn_like(base) * (base - neighbor).abs() / self.sharpness
        return torch.where(torch.rand_like(base) < self.swap, moved, base), None


class Mixture:
    """A fixed share of each batch from each of several sources.

    Args:
        sources: Anything that `as_source` takes, of one sample shape.
        weights: Shares, above 0, scaled to sum to one; equal when None.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | None = None):
        if not isinstance(sources, tuple | list) or not sources:
            raise ValueError(expected("sources", "a list of one source or more", sources))
        self.weights = check.shares("weights", weights, len(sources))
        self.sources = [as_source(source) for source in sources]

    def sample(self, n: int) -> tuple[Inputs, Tensor | None]:
        check.count("n", n)
        parts = [
            source.sample(count) for source, count in zip(self.sources, self.counts(n), strict=True) if count
        ]
        shapes = {tuple(tuple(x.shape[1:]) for x in tensors_in(part)) for part, _ in parts}
        if len(shapes) > 1:
            raise ValueError(expected("sources", "of samples of one shape", shapes))
        samples = concat([part for part, _ in parts])
        if all(labels is None for _, labels in parts):
            return samples, None
        return samples, torch.cat([_labels_or_none_known(*part) for part in parts])

    def counts(self, n: int) -> list[int]:
        """Whole numbers that sum to `n`, each within one of its share of `n`."""
        edges, total = [0], 0.0
        for weight in self.weights[:-1]:
            total += weight
            edges.append(round(total * n))
        return [end - start for start, end in zip(edges, [*edges[1:], n], strict=True)]


def as_source(source: Any) -> Source:
    """Make a source of a source, of tensors, a data set or a DataLoader.

    Args:
        source: An object with `sample`; a tensor (N, *sample_shape) of unlabeled samples, or a tuple or a
            dict of such for a model of several inputs; a map-style data set or a DataLoader whose items are
            samples or (sample, label, ...), a sample being a tensor, a tuple or a dict. What dicts keep under
            "labels" or "label" is that.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, Tensor):
        return InMemory(source)
    if isinstance(source, Mapping):
        return InMemory(*unpacked(source))
    if isinstance(source, tuple) and source and isinstance(source[0], Tensor):
        return InMemory(source)
    if isinstance(source, DataLoader):
        return LoaderSource(source)
    if isinstance(source, TensorDataset):
        return InMemory(*source.tensors[:2])
    if isinstance(source, IterableDataset):
        raise TypeError(expected("source", "a DataLoader around an iterable data set", "the set"))
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return DatasetSource(source)
    raise TypeError(
        expected("source", "an object with sample(n), a tensor, a data set or a DataLoader", type(source))
    )


def _check_samples(samples: Tensor, least: int) -> None:
    what = f"a tensor (N, *sample_shape), N of at least {least}"
    if not isinstance(samples, Tensor):
        raise TypeError(expected("samples", what, samples))
    if samples.ndim < 2 or len(samples) < least:
        raise ValueError(expected("samples", what, samples))


def _labels_or_none_known(samples: Inputs, labels: Tensor | None) -> Tensor:
    if labels is not None:
        return labels
    return torch.full((count_of(samples),), UNLABELED, device=tensors_in(samples)[0].device)


def _nearest(x: Tensor, rows: int = 1024) -> Tensor:  # (N, D) -> (N,)
    """Index of each row's nearest other row, a block of rows at a time."""
    found = []
    for start in range(0, len(x), rows):
        distance = torch.cdist(x[start : start + rows], x)
        distance.diagonal(start).fill_(float("inf"))
        found.append(distance.argmin(dim=1))
    return torch.cat(found)
