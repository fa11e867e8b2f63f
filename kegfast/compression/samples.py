"""Inputs to calibrate with: what the caller has, or noise where there is nothing."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.compression.traffic import answers_of, evaluation
from kegfast.distillation.sources import Mixture

BANK = 8
"""Samples that a source is asked for, for each one kept ..."""
BANK_NUMBERS = 1 << 23
"""... as long as they hold no more numbers than this (8,192 images of 32 x 32)."""
CHUNK = 256
"""Samples that the teacher classifies at once."""


def gather(calibration: Any, n: int, model: nn.Module) -> Tensor:
    """n unlabelled samples from a tensor, a Dataset, a DataLoader or anything with `.sample(n)`.

    They come on the model's device and in its dtype; it has been seen to take them.
    """
    if isinstance(calibration, Tensor):
        samples = calibration[:n]
    elif callable(getattr(calibration, "sample", None)):
        samples = _drawn(calibration, n)
    elif isinstance(calibration, DataLoader | Dataset):
        loader = (
            calibration
            if isinstance(calibration, DataLoader)
            else DataLoader(calibration, batch_size=n, shuffle=True)
        )
        batches, count = [], 0
        for batch in loader:
            batches.append(batch[0] if isinstance(batch, tuple | list) else batch)
            count += len(batches[-1])
            if count >= n:
                break
        samples = torch.cat(batches)[:n] if batches else torch.empty(0)
    else:
        what = "a tensor, a Dataset, a DataLoader or an object with .sample(n)"
        raise TypeError(expected("calibration", what, calibration))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    samples = _checked(samples).to(like)
    with evaluation(model), check.accepts("calibration", samples):
        model(samples[:2])
    return samples


def _checked(samples: Any) -> Tensor:
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise TypeError(expected("calibration", "of floating-point values", samples))
    if len(samples) < 2 or not bool(samples.isfinite().all()):
        raise ValueError(expected("calibration", "at least two finite samples", samples))
    return samples.detach()


def _drawn(source: Any, n: int) -> Any:
    drawn = source.sample(n)
    return drawn[0] if isinstance(drawn, tuple | list) else drawn


def of_every_class(model: nn.Module, samples: Tensor, calibration: Any) -> Tensor:  # (n, ...)
    """As many samples, chosen with others of a source so that a classifier puts them into all classes alike.

    Noise and made images fall into few classes, and leave the others to chance. What the caller chose, in a
    tensor or a data set, stays as it is, and so do samples that `BANK_NUMBERS` leaves no choice of. Each
    source of a mixture keeps its share.
    """
    n = len(samples)
    if isinstance(calibration, Mixture) and n == sum(counts := calibration.counts(n)):
        parts = zip(samples.split(counts), calibration.sources, strict=True)
        return torch.cat([of_every_class(model, part, source) for part, source in parts if len(part)])
    more = min((BANK - 1) * n, BANK_NUMBERS // max(samples[0].numel(), 1) - n)
    if isinstance(calibration, Tensor) or not hasattr(calibration, "sample") or more <= 0:
        return samples
    others = _checked(_drawn(calibration, max(more, 2))).to(samples)
    return balanced(model, torch.cat([samples, others]), n)


@torch.no_grad()
def balanced(model: nn.Module, samples: Tensor, n: int) -> Tensor:  # (m, ...) -> (min(n, m), ...)
    """n of the samples, of each class that the model sees in them as many as there are, in turn.

    Outputs that are no table of logits have no classes: the first n stay.
    """
    with evaluation(model):
        answers = [answers_of(model(chunk)) for chunk in samples.split(CHUNK)]
    if answers[0] is None:
        return samples[:n]
    found = torch.cat(answers)
    seen = F.one_hot(found).cumsum(0).gather(1, found[:, None]).flatten()  # how many of its class came before
    return samples[seen.argsort(stable=True)[:n]]


def probes(shape: Sequence[int]) -> Tensor:
    """Noise of all scales in the shape of one input, for where no sample is at hand.

    White noise excites images' first layers in one narrow way; sums of noise at several resolutions
    have the falling spectrum of natural images.

    Args:
        shape: of one sample, without the batch.

    Returns:
        (n, *shape) samples with zero mean and unit variance each, the same on every call.
    """
    size = int(torch.tensor(shape).prod())
    n = max(8, min(256, (1 << 20) // size))
    generator = torch.Generator().manual_seed(0)
    if len(shape) != 3 or min(shape[1:]) < 4:
        return torch.randn((n, *shape), generator=generator)
    total = torch.zeros((n, *shape))
    levels = max(shape[1:]).bit_length()
    for level in range(1, levels):
        coarse = torch.randn((n, shape[0], 1 << level, 1 << level), generator=generator)
        weight = torch.rand((n, 1, 1, 1), generator=generator) * 2 ** ((levels - level) / 2)
        total += weight * F.interpolate(coarse, size=tuple(shape[1:]), mode="bicubic")
    total -= total.mean((2, 3), keepdim=True) / 2
    return total / total.std((1, 2, 3), keepdim=True)
