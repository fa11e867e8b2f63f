"""The normalization that a network was trained with: given, read off it, or found among the usual ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.modules import evaluation, submodule
from kegfast.compression.norms import batch_statistics
from kegfast.distillation.sources import Augmented, drawn
from kegfast.extraction.moments import running_statistics
from kegfast.extraction.procedural import DeadLeaves, Painted
from kegfast.recovery.subject import Subject
from kegfast.training.loop import seeded

PLAIN = (0.5, 0.25)
"""Mean and deviation of grays where a normalization does not tell: it only moves the range."""
TRIED = 128
"""Dead leaves that candidates are tried on."""
FOREIGN = 5.0
"""Deviations of BatchNorm's statistics that no normalization may leave images away from them."""
KNOWN: dict[str, tuple[Any, Any]] = {
    "mean 0.5, std 0.25": (0.5, 0.25),
    "pixels in [0, 1]": (0.0, 1.0),
    "pixels in [-1, 1]": (0.5, 0.5),
    "mean 0.13, std 0.31 (dark images)": (0.1307, 0.3081),
    "mean and std of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Usual normalizations of pixels in [0, 1]."""
BYTES: dict[str, tuple[Any, Any]] = {"pixels in [0, 255]": (0.0, 1 / 255)}
"""One that only BatchNorm tells: without it larger inputs always make surer outputs."""


@dataclass(frozen=True)
class Pixels:
    """Pixels p in [0, 1] reach the network as (p - mean) / std, per channel.

    Attributes:
        mean, std: of each channel.
        origin: where they come from, in a few words.
        guessed: whether nobody gave them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    guessed: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest value of an input."""
        ends = [(-m / s, (1 - m) / s) for m, s in zip(self.mean, self.std, strict=True)]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @property
    def levels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of made images' grays: the normalization's own where data can have them."""
        pairs = list(zip(self.mean, self.std, strict=True))
        if all(0 < m < 1 and 0 < s < 0.9 * math.sqrt(m * (1 - m)) for m, s in pairs):
            return self.mean, self.std
        return (PLAIN[0],) * len(pairs), (PLAIN[1],) * len(pairs)

    def paint(
        self, kind: type[Painted], sample_shape: Sequence[int], device: torch.device, **options: Any
    ) -> "Painted | Renormalized":
        """A source of made images, as the network wants them."""
        level, spread = self.levels
        made = kind(sample_shape, level, spread, device=device, **options)
        if (level, spread) == (self.mean, self.std):
            return made
        scale = made.std / torch.tensor(self.std, device=device)
        shift = (made.mean - torch.tensor(self.mean, device=device)) / torch.tensor(self.std, device=device)

        def renormalized(images: Tensor) -> Tensor:
            return images * scale[:, None, None] + shift[:, None, None]

        return Renormalized(made, renormalized)


class Renormalized(Augmented):
    """Made images by another normalization than their grays."""

    def __init__(self, made: Painted, change: Callable[[Tensor], Tensor]):
        super().__init__(made, change)
        self.sample_shape = made.sample_shape


def find_pixels(
    subject: Subject,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    input_range: tuple[float, float] | None,
) -> Pixels:
    """The normalization that the arguments give; else one of the usual that suits the network best.

    Raises:
        TypeError, ValueError: the arguments are no normalization.
    """
    channels = subject.sample_shape[0]
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean {mean} and std {std}")
    if mean is not None and std is not None:
        if input_range is not None:
            raise ValueError(expected("input_range", "left out beside mean and std", input_range))
        return Pixels(_each("mean", mean, channels), _each("std", std, channels), "as given")
    if input_range is not None:
        low, high = _range(input_range)
        own = (-low / (high - low),) * channels, (1 / (high - low),) * channels
        return Pixels(*own, f"range {low:g} to {high:g}, as given")
    return _search(subject)


def _search(subject: Subject) -> Pixels:
    channels = subject.sample_shape[0]
    known = KNOWN | BYTES if subject.has_norms else KNOWN
    found: list[tuple[float, Pixels]] = []
    for name, (mean, std) in known.items():
        if isinstance(mean, tuple) and len(mean) != channels:
            continue
        pixels = Pixels(_each("mean", mean, channels), _each("std", std, channels), name, guessed=True)
        with seeded(0):
            leaves = drawn(pixels.paint(DeadLeaves, subject.sample_shape, subject.device), TRIED)
        score = _unfamiliar(subject, leaves) if subject.has_norms else -_sureness(subject, leaves)
        found.append((score, pixels))
    score, best = min(found, key=lambda pair: pair[0])
    if score > FOREIGN:
        what = "given: BatchNorm remembers other inputs than any usual normalization makes"
        raise ValueError(expected("mean and std", what, None))
    how = "closest to BatchNorm's statistics" if subject.has_norms else "surest answers of most kinds"
    return Pixels(best.mean, best.std, f"{best.origin}: {how} of {len(found)} tried", guessed=True)


@torch.no_grad()
def _unfamiliar(subject: Subject, images: Tensor) -> float:
    """How far the first BatchNorm's input is from what it remembers, in its own deviations and their log."""
    with evaluation(subject.model), batch_statistics(subject.model) as seen:
        subject.model(images)
    for name, (mean, variance) in seen.items():
        norm = submodule(subject.model, name, _BatchNorm)
        if norm.running_mean is not None:
            known_mean, known_variance = running_statistics(norm)
            deviation = (known_variance + norm.eps).sqrt()
            shift = ((mean - known_mean) / deviation).abs()
            stretch = ((variance + norm.eps).sqrt() / deviation).log().abs()
            return float((shift + stretch).mean())
    return math.inf


@torch.no_grad()
def _sureness(subject: Subject, images: Tensor) -> float:
    """Mutual information of image and answer: sure of each, and not of the same class."""
    with evaluation(subject.model):
        p = subject.teacher(images).float().softmax(1)
    return float(_entropy(p.mean(0)) - _entropy(p).mean())


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def _each(argument: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence | Tensor) else (value,) * channels
    if len(values) != channels:
        raise ValueError(expected(argument, f"a number or {channels} of them, one per channel", value))
    bound = {"above": 0.0} if argument == "std" else {}
    return tuple(
        float(check.number(argument, float(v) if isinstance(v, Tensor) else v, **bound)) for v in values
    )


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(expected("input_range", "(lowest, highest)", value))
    low, high = (check.number("input_range", v) for v in value)
    if not low < high:
        raise ValueError(expected("input_range", "(lowest, highest)", value))
    return low, high
