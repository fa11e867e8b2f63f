"""Inputs to calibrate with: what the caller has, or noise where there is nothing."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.inputs import (
    Inputs,
    as_inputs,
    call,
    concat,
    copied,
    count,
    each,
    split,
    take,
    tensors_in,
    to_like,
    unpack,
)
from kegfast._util.modules import evaluation
from kegfast.compression.traffic import answers_of
from kegfast.distillation.sources import Mixture

BANK = 8
"""Samples that a source is asked for, for each one kept ..."""
BANK_NUMBERS = 1 << 23
"""... as long as they hold no more numbers than this (8,192 images of 32 x 32)."""
CHUNK = 256
"""Samples that the teacher classifies at once."""


def gather(calibration: Any, n: int, model: nn.Module) -> Inputs:
    """n unlabeled samples: of given inputs, a Dataset, a DataLoader or anything with `.sample(n)`.

    They come on the model's device and in its dtype; it has been seen to take them.
    """
    if callable(getattr(calibration, "sample", None)):
        samples = _drawn(calibration, n, model)
    elif isinstance(calibration, DataLoader | Dataset):
        loader = (
            calibration
            if isinstance(calibration, DataLoader)
            else DataLoader(calibration, batch_size=n, shuffle=True)
        )
        batches, found = [], 0
        for batch in loader:
            batches.append(unpack("calibration", batch, model)[0])
            found += count(batches[-1])
            if found >= n:
                break
        samples = take(concat(batches), slice(n)) if batches else torch.empty(0)
    elif isinstance(calibration, Tensor | tuple | list | Mapping):
        samples = take(as_inputs("calibration", calibration), slice(n))
    else:
        what = "a tensor, a tuple or a dict of them, a Dataset, a DataLoader or an object with .sample(n)"
        raise TypeError(expected("calibration", what, calibration))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    samples = to_like(_checked(samples), like)
    with evaluation(model), check.accepts("calibration", samples):
        call(model, copied(take(samples, slice(2))))
    return samples


def _checked(samples: Inputs) -> Inputs:
    if count(samples) < 2 or not all(bool(x.isfinite().all()) for x in tensors_in(samples)):
        raise ValueError(expected("calibration", "at least two finite samples", samples))
    return each(Tensor.detach, samples)


def _drawn(source: Any, n: int, model: nn.Module) -> Inputs:
    return unpack("calibration", source.sample(n), model)[0]


def of_every_class(model: nn.Module, samples: Inputs, calibration: Any) -> Inputs:
    """As many samples of a source, chosen among more so that the model's predictions cover all classes.

    Noise and made images fall into few classes, and leave the others to chance. What the caller chose, in
    tensors or a data set, stays as it is, and so do samples that `BANK_NUMBERS` leaves no choice of. Each
    source of a mixture keeps its share.
    """
    n = count(samples)
    if isinstance(calibration, Mixture) and n == sum(counts := calibration.counts(n)):
        ends = list(accumulate(counts))
        parts = [take(samples, slice(end - size, end)) for size, end in zip(counts, ends, strict=True)]
        chosen = zip(parts, calibration.sources, strict=True)
        return concat([of_every_class(model, part, source) for part, source in chosen if count(part)])
    numbers = sum(x[:1].numel() for x in tensors_in(samples) if x.dim())
    more = min((BANK - 1) * n, BANK_NUMBERS // max(numbers, 1) - n)
    if not callable(getattr(calibration, "sample", None)) or more <= 0:
        return samples
    like = max(tensors_in(samples), key=Tensor.is_floating_point)
    others = to_like(_checked(_drawn(calibration, max(more, 2), model)), like)
    return balanced(model, concat([samples, others]), n)


@torch.no_grad()
def balanced(model: nn.Module, samples: Inputs, n: int) -> Inputs:  # m samples -> min(n, m)
    """At most n of the samples, balanced over the classes that the model predicts for them.

    Classes take turns until n samples are chosen; one that runs out is passed over. A model whose output is
    no table of logits has no classes: the first n samples are taken.
    """
    with evaluation(model):
        chunks = split(samples, CHUNK)
        answers = [x for x in (answers_of(call(model, copied(chunk))) for chunk in chunks) if x is not None]
    if len(answers) < len(chunks):
        return take(samples, slice(n))
    found = torch.cat(answers)
    seen = F.one_hot(found).cumsum(0).gather(1, found[:, None]).flatten()  # how many of its class came before
    return take(samples, seen.argsort(stable=True)[:n])


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
