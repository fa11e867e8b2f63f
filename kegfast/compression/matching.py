"""Samples changed until they look to a model's BatchNorms like what it was trained on.

The running statistics are all that a network tells about its data: each layer's input means and variances.
Made samples that have them give error metrics nearly as good as real ones (cf. Cai et al., ZeroQ, and Yin et
al., DeepInversion, both CVPR 2020).
"""

import logging
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util.inputs import Inputs, call, each, take, tensors_in, to_like
from kegfast._util.modules import clone
from kegfast.compression.traffic import logits_of
from kegfast.extraction.moments import NormMoments, running_statistics
from kegfast.extraction.teacher import FrozenTeacher

log = logging.getLogger(__name__)

STEPS = 120
RATE = 0.1
"""Of Adam at its first step; it falls to 0 along half a cosine."""
SPREAD = 0.1
"""Weight of the cross-entropy that spreads the samples over all classes, where the outputs are logits."""
NUMBERS = 1 << 18
"""At most so many numbers (256 images of 32 x 32) are optimized, but at least LEAST samples."""
LEAST = 16


@overload
def match_statistics(model: nn.Module, samples: Tensor) -> Tensor: ...


@overload
def match_statistics(model: nn.Module, samples: Inputs) -> Inputs: ...


def match_statistics(model: nn.Module, samples: Inputs) -> Inputs:
    """Moves samples, within their own range, towards a model's BatchNorm statistics.

    Args:
        model: the teacher, unchanged, with at least one BatchNorm that has running statistics.
        samples: any to start from; the closer to the data, the better. Of several tensors, those of
            floating-point numbers are moved.

    Returns:
        The moved samples, as many as `NUMBERS` allows; the given ones where that leads nowhere.
    """
    values = [x for x in tensors_in(samples) if x.is_floating_point() and x.dim()]
    if not values:
        return samples
    most = max(LEAST, NUMBERS // max(sum(x[0].numel() for x in values), 1))
    start = take(samples, slice(most))
    teacher = FrozenTeacher(_Values(clone(model).float(), start), watch=True)
    starts = [x[:most].float() for x in values]
    bounds = [(float(x.amin()), float(x.amax())) for x in starts]
    moved = [x.clone().requires_grad_(True) for x in starts]
    optimizer = torch.optim.Adam(moved, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for step in range(STEPS):
            output, seen = teacher(tuple(moved))
            distance = sum(map(_distance, seen), start=moved[0].new_zeros(()))
            gradients = torch.autograd.grad(distance + SPREAD * _spread(output), moved, allow_unused=True)
            for x, gradient in zip(moved, gradients, strict=True):
                x.grad = gradient
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for x, (low, high) in zip(moved, bounds, strict=True):
                    x.clamp_(low, high)
            if step % 10 == 0:
                log.info("step %d: distance to the BatchNorm statistics %.4f", step, float(distance.detach()))
    if not all(bool(x.isfinite().all()) for x in moved):
        return samples
    return to_like(_with_values(start, [x.detach() for x in moved]), values[0])


class _Values(nn.Module):
    """A model as one of the floating-point tensors among its inputs; the others stay those of the samples."""

    def __init__(self, model: nn.Module, samples: Inputs):
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, values: Sequence[Tensor]) -> Any:
        return call(self.model, _with_values(self.samples, values))


def _with_values(samples: Inputs, values: Sequence[Tensor]) -> Inputs:
    """The samples with other numbers in their floating-point tensors."""
    rest = iter(values)
    return each(lambda x: next(rest) if x.is_floating_point() and x.dim() else x, samples)


def _distance(seen: NormMoments) -> Tensor:
    """Of means and deviations, in units of the learnt deviations."""
    mean, variance = running_statistics(seen.layer)
    deviation = (variance + seen.layer.eps).sqrt()
    shift = (seen.mean - mean) / deviation
    stretch = (seen.variance + seen.layer.eps).sqrt() / deviation - 1
    return shift.square().mean() + stretch.square().mean()


def _spread(output: Any) -> Tensor | float:
    """Cross-entropy with the classes in turn; 0 for what is no table of logits."""
    logits = logits_of(output)
    if logits is None:
        return 0.0
    classes = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return F.cross_entropy(logits, classes)
