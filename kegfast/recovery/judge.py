"""Which student is closest to its teacher, told by samples that it was not taught with."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util.modules import evaluation
from kegfast.recovery.subject import Subject

SURELY = 0.9
"""A student that has learnt for longer must diverge from its teacher by less than this share of what one
does that has learnt less: what no sample shows is forgotten unseen."""
FARTHEST = 1e6
"""The divergence of a student whose answers are no numbers."""
CHUNK = 128
"""Samples that run at once; small ones stay in a CPU's caches."""
FEW = 64
"""So many samples of data count as much as all made ones."""


class Verdict(NamedTuple):
    """How a student answers to held-out samples.

    Attributes:
        divergence: KL divergence from the teacher, mean over samples.
        agreement: percent of the samples that both put into one class.
    """

    divergence: float
    agreement: float


class Judge:
    """Held-out samples, and the teacher's answers to them.

    Args:
        subject: the teacher.
        made: artificial samples, (n, *sample_shape).
        data: real ones, if any: the more, the more they count.
    """

    def __init__(self, subject: Subject, made: Tensor, data: Tensor | None = None):
        self.subject = subject
        self.sets = {"made": made} if data is None or not len(data) else {"made": made, "data": data}
        self._answers = {name: answers(subject.teacher, x) for name, x in self.sets.items()}

    def verdicts(self, student: nn.Module) -> dict[str, Verdict]:
        """On each set."""
        return {name: self._verdict(student, name) for name in self.sets}

    def divergence(self, verdicts: Mapping[str, Verdict]) -> float:
        """One number for a student's verdicts."""
        if "data" not in verdicts:
            return verdicts["made"].divergence
        n = len(self.sets["data"])
        share = n / (n + FEW)
        return share * verdicts["data"].divergence + (1 - share) * verdicts["made"].divergence

    def _verdict(self, student: nn.Module, name: str) -> Verdict:
        wanted = self._answers[name]
        own = answers(self.subject.logits(student), self.sets[name])
        divergence = F.kl_div(own, wanted, log_target=True, reduction="batchmean")
        same = (own.argmax(1) == wanted.argmax(1)).float().mean()
        return Verdict(float(divergence.nan_to_num(FARTHEST, FARTHEST)), 100 * float(same))


@torch.no_grad()
def answers(model: nn.Module, samples: Tensor) -> Tensor:  # (n, ...) -> (n, classes)
    """Logarithms of the probabilities that a model of logits gives, in float32."""
    with evaluation(model):
        return torch.cat([model(part).float().log_softmax(1) for part in samples.split(CHUNK)])


def choice(divergence: Sequence[float]) -> int:
    """The first candidate that none of the later ones surely beats."""
    return next(i for i, own in enumerate(divergence) if min(divergence) >= SURELY * own)
