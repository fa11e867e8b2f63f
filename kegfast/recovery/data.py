"""What the caller gives beside the network: unlabeled data, or a source of samples of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kegfast._util.check import expected
from kegfast.compression.norms import look_familiar
from kegfast.compression.samples import gather
from kegfast.distillation.sources import Source, as_source
from kegfast.recovery.pixels import Pixels
from kegfast.recovery.subject import Subject
from kegfast.training.loop import seeded

MOST = 10_000
"""Samples of data that are used, of up to `NUMBERS` numbers in all."""
NUMBERS = 1 << 26
JUDGES = 64
"""With fewer samples none is kept back to judge by; else a quarter, up to `HELD`."""
HELD = 1_000
BEYOND = 0.5
"""Samples may leave the range of pixels by this share of it."""
LOOK = 256
"""Samples that BatchNorm is shown."""
LOOKED_AT = 16
"""Samples of a source that are looked at before anything is made of it."""


@dataclass(frozen=True)
class Data:
    """Unlabeled samples.

    Attributes:
        taught: those that students are taught with.
        held: those that they are judged by.
        trusted: whether BatchNorm finds them like what the network was trained on.
    """

    taught: Tensor
    held: Tensor
    trusted: bool

    @property
    def share(self) -> float:
        """Of the samples of a step: a few among made ones, most of them where there are thousands."""
        return len(self.taught) / (len(self.taught) + LOOK)


def take_data(subject: Subject, pixels: Pixels | None, data: Any) -> Data:
    """The samples of `data`, checked.

    Raises:
        TypeError, ValueError: it holds no samples that the network takes.
    """
    most = max(16, min(MOST, NUMBERS // subject.numbers))
    try:
        samples = gather(data, most, subject.model)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("calibration", "data", 1)) from error
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise TypeError(expected("data", "floating-point samples, one tensor for each", samples))
    _check(subject, pixels, samples, "data")
    held = samples[::4][:HELD] if len(samples) >= JUDGES else samples[:0]
    taught = samples if not len(held) else samples[_rest(len(samples), len(held))]
    trusted = not subject.has_norms or len(samples) < JUDGES or look_familiar(subject.model, samples[:LOOK])
    return Data(taught, held, trusted)


def _rest(n: int, held: int) -> Tensor:
    kept = torch.ones(n, dtype=torch.bool)
    kept[torch.arange(held) * 4] = False
    return kept


def take_source(subject: Subject, pixels: Pixels | None, source: Any) -> Source:
    """The caller's own source, seen to give samples that the network takes.

    Raises:
        TypeError, ValueError: it gives none.
    """
    found = _Given(as_source(source))
    with seeded(0):
        samples = found.sample(LOOKED_AT)[0]
    _check(subject, pixels, samples, "source")
    return found


class _Given:
    """The caller's source: its samples without their labels, which may come without a pair around them."""

    def __init__(self, source: Source):
        self.source = source

    def sample(self, n: int) -> tuple[Tensor, None]:
        drawn: Any = self.source.sample(n)
        samples = drawn[0] if isinstance(drawn, tuple | list) else drawn
        if not isinstance(samples, Tensor) or not samples.is_floating_point() or len(samples) != n:
            raise TypeError(expected("source", f"a source of {n} floating-point samples", samples))
        return samples, None


def _check(subject: Subject, pixels: Pixels | None, samples: Tensor, name: str) -> None:
    if tuple(samples.shape[1:]) != subject.sample_shape:
        raise ValueError(expected(name, f"samples of shape {subject.sample_shape}", tuple(samples.shape[1:])))
    if not bool(samples.isfinite().all()):
        raise ValueError(expected(name, "of finite values", "NaN or infinity"))
    if pixels is None or pixels.guessed:
        return
    low, high = pixels.range
    room = BEYOND * (high - low)
    least, most = float(samples.min()), float(samples.max())
    if least < low - room or most > high + room:
        what = f"normalized as mean and std say, in [{low:.4g}, {high:.4g}]"
        raise ValueError(f"{name} must be {what}, got values from {least:.4g} to {most:.4g}")
