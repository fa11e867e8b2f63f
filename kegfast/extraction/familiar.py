"""Images that a classifier takes for its classes, a few steps away from images that no data made.

What the network answers to artificial images falls mostly into a few classes, and it is seldom sure. A few
steps on the pixels, down the cross-entropy with a class, lead to where it decides as on its data (the prior
of Mordvintsev, Olah and Tyka 2015, kept near where it began).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.extraction.teacher import FrozenTeacher

STEPS, RATE = 15, 0.1
"""Of Adam, on pixels of normalized images."""
CHUNK = 256
"""Images that are moved at a time."""


class Familiar:
    """A source of another one's images, moved towards the classes in turn and within their own range.

    Args:
        source: One of sample_shape; see `kegfast.distillation.sources`.
        teacher: Samples (n, *sample_shape) to logits; a private copy is used.
        num_classes: How many logits.
        steps: On the pixels; the more, the surer the teacher and the further from the source.

    Raises:
        TypeError, ValueError: An argument is wrong, or the teacher does not fit the source.
    """

    def __init__(self, source: object, teacher: nn.Module, num_classes: int, steps: int = STEPS):
        if not (hasattr(source, "sample") and hasattr(source, "sample_shape")):
            raise TypeError(expected("source", "a source of one sample_shape", source))
        self.source, self.num_classes = source, num_classes
        self.steps = check.count("steps", steps)
        self.teacher = FrozenTeacher(teacher, watch=False)
        probe = self.teacher.check(num_classes, source.sample_shape, self.teacher.device)
        self.teacher.check_gradient(probe)

    def sample(self, n: int) -> tuple[Tensor, None]:
        """Draw `n` samples, (n, *sample_shape) float32, without labels."""
        samples = self.source.sample(check.count("n", n))[0].to(self.teacher.device)
        return torch.cat([self._moved(part) for part in samples.split(CHUNK)]), None

    def _moved(self, samples: Tensor) -> Tensor:
        low, high = samples.aminmax()
        labels = torch.arange(len(samples), device=samples.device) % self.num_classes
        moved = samples.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([moved], RATE)
        with torch.enable_grad():
            for _ in range(self.steps):
                loss = F.cross_entropy(self.teacher(moved)[0], labels, reduction="sum")
                (moved.grad,) = torch.autograd.grad(loss, moved)
                optimizer.step()
                with torch.no_grad():
                    moved.clamp_(low, high)
        return moved.detach()
