"""What a student's agreement with its teacher will be on real data, told by samples that are none."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kegfast._util.statistics import binomial_interval
from kegfast.recovery.subject import Subject

if TYPE_CHECKING:
    from kegfast.recovery.report import Candidate

NINE_IN_TEN = 1.645
"""Deviations on either side of a mean that hold nine in ten."""


@dataclass(frozen=True)
class Prediction:
    """Percent of real samples that student and teacher will put into one class.

    Attributes:
        agreement: what is expected.
        low, high: bounds of nine in ten cases.
        basis: what it was told by.
    """

    agreement: float
    low: float
    high: float
    basis: str

    def __str__(self) -> str:
        return f"{self.agreement:.1f} % ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Line:
    """How disagreement d on real data goes with divergence on artificial samples, where both are known.

    logit(d) = level + slope log(divergence), give or take `spread` (a standard deviation).
    """

    level: float
    slope: float
    spread: float

    def agreement(self, divergence: float, deviations: float = 0.0) -> float:
        """Percent, so many deviations of the spread above the line."""
        value = self.level + self.slope * math.log(max(divergence, 1e-9)) - deviations * self.spread
        return 100 / (1 + math.exp(value))


PLAIN = Line(0.05, 0.98, 0.4)
"""Of networks without BatchNorm, by held-out images of all kinds."""
NORMS = Line(-1.85, 0.82, 0.5)
"""Of networks with it, by held-out images that it finds familiar, before any teaching."""


TAUGHT = 0.25
"""Teaching on images that BatchNorm finds familiar takes the divergence on others of them down by more than
the disagreement on real ones, which goes down by this power of it."""


def predict(
    subject: Subject,
    candidate: "Candidate",
    before: "Candidate | None" = None,
    held: int = 0,
    artificial: bool = True,
) -> Prediction | None:
    """What a judged student's agreement will be.

    Args:
        subject: its teacher.
        candidate: the student and its verdicts.
        before: the student that it was taught from; None for one that was not taught.
        held: how many real samples judged.
        artificial: whether the other judges are the recipe's own samples, of which experience tells.

    Returns:
        None where no such network and samples are known.
    """
    if held and "data" in candidate.verdicts:
        return _counted(candidate.verdicts["data"].agreement, held)
    if subject.kind != "image" or not artificial:
        return None
    line = NORMS if subject.has_norms else PLAIN
    divergence = candidate.verdicts["made"].divergence
    if before is not None and subject.has_norms:
        start = before.verdicts["made"].divergence
        divergence = start * (divergence / start) ** (TAUGHT / line.slope) if start > 0 else divergence
    low, middle, high = (line.agreement(divergence, k * NINE_IN_TEN) for k in (-1, 0, 1))
    return Prediction(middle, low, high, "artificial samples, and networks whose data are known")


def _counted(percent: float, n: int) -> Prediction:
    """From held-out data alone."""
    low, high = binomial_interval(percent, n, NINE_IN_TEN)
    return Prediction(percent, low, high, f"{n} samples of the data given")
