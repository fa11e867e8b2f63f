"""Samples changed until they look to a model's BatchNorms like what it was trained on.

The running statistics are all that a network tells about its data: each layer's input means and variances.
Made samples that have them give error metrics nearly as good as real ones (cf. Cai et al., ZeroQ, and Yin et
al., DeepInversion, both CVPR 2020).
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kegfast._util.modules import clone
from kegfast.extraction.moments import NormMoments
from kegfast.extraction.teacher import FrozenTeacher

log = logging.getLogger(__name__)

STEPS = 120
RATE = 0.1
"""Of Adam at its first step; it falls to 0 along half a cosine."""
SPREAD = 0.1
"""Weight of the cross-entropy that spreads the samples over all classes, where the outputs are logits."""
NUMBERS = 1 << 18
"""At most so many numbers (256 images of 32 x 32) are optimised, but at least LEAST samples."""
LEAST = 16


def match_statistics(model: nn.Module, samples: Tensor) -> Tensor:  # (n, ...) -> (m <= n, ...)
    """Moves samples, within their own range, towards a model's BatchNorm statistics.

    Args:
        model: the teacher, unchanged, with at least one BatchNorm that has running statistics.
        samples: any to start from; the closer to the data, the better.

    Returns:
        The moved samples; the given ones where that leads nowhere.
    """
    count = max(LEAST, NUMBERS // max(samples[0].numel(), 1))
    start = samples[:count].float()
    teacher = FrozenTeacher(clone(model).float(), watch=True)
    low, high = float(start.amin()), float(start.amax())
    moved = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([moved], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for step in range(STEPS):
            output, seen = teacher(moved)
            distance = sum(map(_distance, seen))
            (moved.grad,) = torch.autograd.grad(distance + SPREAD * _spread(output), moved)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                moved.clamp_(low, high)
            if step % 10 == 0:
                log.info("step %d: distance to the BatchNorm statistics %.4f", step, float(distance.detach()))
    return moved.detach().to(samples) if bool(moved.isfinite().all()) else samples


def _distance(seen: NormMoments) -> Tensor:
    """Of means and deviations, in units of the learnt deviations."""
    norm = seen.layer
    deviation = (norm.running_var + norm.eps).sqrt()
    shift = (seen.mean - norm.running_mean) / deviation
    stretch = (seen.variance + norm.eps).sqrt() / deviation - 1
    return shift.square().mean() + stretch.square().mean()


def _spread(output: Any) -> Tensor | float:
    """Cross-entropy with the classes in turn; 0 for what is no table of logits."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        return 0.0
    classes = torch.arange(len(output), device=output.device) % output.shape[1]
    return F.cross_entropy(output, classes)
