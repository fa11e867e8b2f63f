"""Rows of a table that a classifier is sure of: Langevin dynamics in the place of a generator.

A classifier and a prior define p(x | y) ~ p(y | x) p(x), which unadjusted Langevin steps sample from (Welling
and Teh 2011; with the classifier's own density, Grathwohl et al., Your Classifier is Secretly an Energy
Based Model, ICLR 2020). Every sample starts from a draw of its own, so none of a generator's collapse.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.extraction.teacher import FrozenTeacher

SLOPE = 5.0
"""The most that one value's gradient counts: beyond a boundary a classifier's can be arbitrarily steep."""


class Langevin:
    """A source of samples x from N(0, I) times the teacher's p(label | x), labels drawn uniformly.

    Args:
        teacher: samples (n, *sample_shape) to logits; a private copy is used.
        num_classes: number of logits.
        sample_shape: of one sample, normalised to mean 0 and variance 1 per value.
        steps: gradient steps from a draw of the prior.
        rate: size of a step.
        noise: share of the Langevin noise; 1 samples the density, less stays closer to its peaks.
    """

    def __init__(
        self,
        teacher: nn.Module,
        num_classes: int,
        sample_shape: Sequence[int],
        steps: int = 10,
        rate: float = 0.3,
        noise: float = 0.1,
    ):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(expected("steps", "a positive int", steps))
        if not rate > 0:
            raise ValueError(expected("rate", "a number above 0", rate))
        if not noise >= 0:
            raise ValueError(expected("noise", "a number of 0 or more", noise))
        self.teacher = FrozenTeacher(teacher, watch=False)
        self.teacher.check(num_classes, sample_shape, self.teacher.device)
        self.num_classes, self.sample_shape = num_classes, tuple(sample_shape)
        self.steps, self.rate, self.noise = steps, rate, noise

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw samples (n, *sample_shape) and the labels that they were drawn for, (n,) int64."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(expected("n", "a positive int", n))
        device = self.teacher.device
        labels = torch.randint(self.num_classes, (n,), device=device)
        x = torch.randn(n, *self.sample_shape, device=device)
        for _ in range(self.steps):
            step = self._slope(x, labels).clamp_(-SLOPE, SLOPE).mul_(self.rate)
            x = x + step + (2 * self.rate) ** 0.5 * self.noise * torch.randn_like(x)
        return x, labels

    def _slope(self, x: Tensor, labels: Tensor) -> Tensor:
        """The gradient of log p(label | x) + log N(x; 0, I)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            likelihood = -F.cross_entropy(self.teacher(x)[0].float(), labels, reduction="sum")
            (slope,) = torch.autograd.grad(likelihood, x)
        return slope - x.detach()
