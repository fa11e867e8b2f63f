"""Samples that no data made, by what a network is: of images with BatchNorm, without it, rows, or neither."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from kegfast.compression.matching import match_statistics
from kegfast.distillation.sources import Augmented, GaussianNoise, InMemory, Mixture, Pool, Source, drawn
from kegfast.extraction.class_sums import ClassSums
from kegfast.extraction.familiar import Familiar
from kegfast.extraction.procedural import Blobs, DeadLeaves, bent
from kegfast.recovery.pixels import Pixels
from kegfast.recovery.subject import Subject
from kegfast.training.classifier import random_shift
from kegfast.training.loop import mix, seeded

MANY = 16
"""The most leaves on an image of the family that has many."""
SHIFT = 16
"""Views of an image are moved by up to 1 / `SHIFT` of its side, and mirrored or not: leaves fall anywhere."""
SHOWN = 72
"""Samples that a report shows."""
SIDE = 32
"""Of images, in `Amounts`; larger ones are fewer, so that all hold as many numbers."""


@dataclass(frozen=True)
class Amounts:
    """How many samples are made.

    Attributes:
        pool: that a student is taught with.
        matched: whose BatchNorm statistics are matched, of which the pool is views.
        judged: that students are judged by.
        calibration: that factors are solved on.
    """

    pool: int
    matched: int
    judged: int
    calibration: int


def amounts(subject: Subject) -> Amounts:
    """As many as pay, by what the network is and how large its samples are."""
    if subject.kind == "image" and subject.has_norms:
        share = min(1.0, 3 * SIDE * SIDE / subject.numbers)
        return Amounts(_part(8_192, share), _part(384, share), _part(128, share), _part(192, share))
    share = min(1.0, SIDE * SIDE / subject.numbers)
    return Amounts(_part(65_536, share), 0, _part(2_000, share), _part(512, share))


def _part(count: int, share: float, least: int = 16) -> int:
    return max(least, round(count * share))


def leaves(subject: Subject, pixels: Pixels | None, **options: int) -> Source:
    """Dead leaves as the network wants its images."""
    assert pixels is not None, "images have a normalization"
    return pixels.paint(DeadLeaves, subject.sample_shape, subject.device, **options)


def image_kinds(subject: Subject, pixels: Pixels | None) -> dict[str, Source]:
    """Kinds of artificial images, to be mixed in equal shares for a network without BatchNorm.

    Each leaves a student free where another holds it.
    """
    assert pixels is not None, "images have a normalization"
    return {
        "many leaves": leaves(subject, pixels, most=MANY),
        "bent leaves": Augmented(leaves(subject, pixels), bent),
        "blobs": pixels.paint(Blobs, subject.sample_shape, subject.device),
        "leaves moved towards classes": familiar(subject, leaves(subject, pixels)),
    }


def familiar(subject: Subject, source: Source) -> Source:
    """Samples that the teacher takes for its classes in turn.

    What it answers to noise or dead leaves falls mostly into a few classes.
    """
    return Familiar(source, subject.teacher, subject.num_classes)


def rows(subject: Subject) -> Source:
    """Sums of Gaussian rows that the teacher puts into one class, as many of every class."""
    return ClassSums(
        subject.teacher, subject.num_classes, GaussianNoise(subject.sample_shape, device=subject.device)
    )


def match(subject: Subject, source: Source, n: int) -> Tensor:
    """`n` samples of a source, changed until the teacher's BatchNorm finds them familiar."""
    left = drawn(source, n)
    parts: list[Tensor] = []
    while len(left):
        parts.append(match_statistics(subject.teacher, left))
        left = left[len(parts[-1]) :]
    return torch.cat(parts)


def views(samples: Tensor) -> Source:
    """The samples, images moved a little and mirrored."""
    source = InMemory(samples)
    return Augmented(source, moved) if samples.dim() == 4 else source


def shifted(images: Tensor) -> Tensor:  # (N, C, H, W)
    """Each by up to 1 / `SHIFT` of its side."""
    return random_shift(images, max(1, images.shape[-1] // SHIFT))


def moved(images: Tensor) -> Tensor:  # (N, C, H, W)
    """Shifted, and mirrored or not."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return shifted(torch.where(mirrored, images.flip(3), images))


@contextmanager
def drawing(seed: int, name: str) -> Iterator[None]:
    """Draws as (seed, name) has them."""
    with seeded(mix(seed, crc32(name.encode()))):
        yield


class MadeSamples:
    """The samples made for one network; none that is not asked for.

    Args:
        subject: the network.
        pixels: how it wants its images; None where its samples are none.
        seed: of all draws.
        source: of the caller's own, in place of the artificial ones.
        amounts: how many; by the network when None.
    """

    def __init__(
        self,
        subject: Subject,
        pixels: Pixels | None,
        seed: int,
        source: Source | None = None,
        counts: Amounts | None = None,
    ):
        self.subject, self.pixels, self.seed, self.own = subject, pixels, seed, source
        self.counts = counts or amounts(subject)
        self.parts = {"matched": self.counts.matched, "judge": self.counts.judged}
        self.kept: dict[str, Tensor] = {}

    @property
    def is_matched(self) -> bool:
        """Whether samples are changed to BatchNorm's statistics: not rows, which noise is not far from."""
        return self.subject.has_norms and self.subject.kind != "row"

    @property
    def description(self) -> str:
        """What the samples are, in words."""
        if self.own is not None:
            name = "samples of the given source"
        elif self.subject.kind == "image" and not self.is_matched:
            kinds = list(image_kinds(self.subject, self.pixels))
            name = f"images of {len(kinds)} kinds: {', '.join(kinds)}"
        else:
            name = {"image": "dead leaves", "row": "sums of Gaussian rows of one class", "other": "noise"}[
                self.subject.kind
            ]
        return name + (", changed until BatchNorm finds them familiar" if self.is_matched else "")

    def raw(self) -> Source:
        """Samples before anything is matched."""
        if self.own is not None:
            return self.own
        if self.subject.kind == "row":
            return rows(self.subject)
        if self.subject.kind == "other":
            return GaussianNoise(self.subject.sample_shape, device=self.subject.device)
        if self.is_matched:
            return leaves(self.subject, self.pixels)
        return Mixture(list(image_kinds(self.subject, self.pixels).values()))

    def pool(self) -> Pool:
        """What a student is taught with."""
        source = self.source()
        with drawing(self.seed, "kegfast"):
            return Pool(source, self.counts.pool)

    def source(self) -> Source:
        """Of what that is drawn."""
        return views(self.matched("matched")) if self.is_matched else self.raw()

    def calibration(self) -> Tensor:
        """What factors are solved on; matched ones as they were matched."""
        n = self.counts.calibration
        if self.is_matched:
            return self.matched("matched")[:n]
        with drawing(self.seed, "kegfast held out"):
            return drawn(self.raw(), n)

    def judge(self) -> Tensor:
        """Held-out samples that any student is judged by.

        They are of all kinds: those that the teacher is sure of tell students apart too late, and the others
        alone show too few of its classes.
        """
        if self.is_matched:
            return self.matched("judge")
        with drawing(self.seed, "judge"):
            return drawn(self.raw(), self.counts.judged)

    def shown(self) -> Tensor:
        """Some of the samples."""
        if self.is_matched:
            return self.matched("matched")
        with drawing(self.seed, "shown"):
            return drawn(self.raw(), SHOWN)

    def matched(self, name: str) -> Tensor:
        """Matched samples, made once; `name` is one of `parts`."""
        if name not in self.kept:
            with drawing(self.seed, name):
                self.kept[name] = match(self.subject, self.raw(), self.parts[name])
        return self.kept[name]

    def keep(self, samples: Mapping[str, Tensor]) -> None:
        """Takes matched samples that an earlier run has made."""
        self.kept |= {name: x.to(self.subject.device) for name, x in samples.items() if name in self.parts}
