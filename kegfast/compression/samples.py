"""Inputs to calibrate with: what the caller has, or noise where there is nothing."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kegfast.check import expected


def gather(calibration: Any, n: int) -> Tensor:
    """n unlabelled samples from a tensor, a Dataset, a DataLoader or anything with `.sample(n)`."""
    if isinstance(calibration, Tensor):
        samples = calibration[:n]
    elif callable(getattr(calibration, "sample", None)):
        drawn = calibration.sample(n)
        samples = drawn[0] if isinstance(drawn, tuple | list) else drawn
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
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise TypeError(expected("calibration", "of floating-point values", samples))
    if len(samples) < 2 or not bool(samples.isfinite().all()):
        raise ValueError(expected("calibration", "at least two finite samples", samples))
    return samples.detach()


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
