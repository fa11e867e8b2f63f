"""Splits of a data set, and what one has to know about it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import TensorDataset

from kegfast._util.check import expected

SEED = 2019
"""Seed of every shuffle: the paper's for Letter."""


@dataclass(frozen=True)
class DataInfo:
    """What a model must know about a data set.

    Attributes:
        name: the name that `load` takes.
        num_classes: labels are 0 ... num_classes - 1.
        sample_shape: (C, H, W) of an image, (F,) of a table's row.
        mean: per channel, subtracted from images in [0, 1]; empty where samples come normalized.
        std: per channel, divided by.
    """

    name: str
    num_classes: int
    sample_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def input_range(self) -> tuple[list[float], list[float]] | None:
        """The smallest and the largest normalized pixel per channel; None for tables."""
        if not self.mean:
            return None
        pairs = list(zip(self.mean, self.std, strict=True))
        return [-mean / std for mean, std in pairs], [(1 - mean) / std for mean, std in pairs]


class Samples(TensorDataset):
    """A TensorDataset of samples (N, *sample_shape) float32 and labels (N,) int64 that knows its `info`."""

    def __init__(self, samples: np.ndarray, labels: np.ndarray, info: DataInfo) -> None:
        super().__init__(torch.from_numpy(samples), torch.from_numpy(labels))
        self.info = info


class Splits(NamedTuple):
    """The three parts of a data set: what is trained on, what settings are chosen by, what is reported."""

    train: Samples
    val: Samples
    test: Samples

    @property
    def info(self) -> DataInfo:
        """What the parts have in common."""
        return self.train.info


def make_splits(
    info: DataInfo,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    val: int | None = None,
) -> Splits:
    """Split arrays that are normalized already, always in the same way.

    Args:
        info: the data set.
        train: samples and labels.
        test: the same for the test set; without it `train` is shuffled and split 7:1:2.
        val: take the last `val` training samples for validation; without it `train` is shuffled and one
            tenth taken.

    Raises:
        ValueError: samples and labels do not fit each other or `info`, or are not finite.
    """
    for part in (train, test) if test else (train,):
        _check(info, *part)
    n = len(train[1])
    if info.num_classes > n:
        raise ValueError(expected("labels", f"below {n}, the number of samples", info.num_classes - 1))
    order = np.arange(n)
    if test is None:
        _shuffle(order)
        parts = np.split(order, [n * 7 // 10, n * 8 // 10])
        return Splits(*(_take(info, train, part) for part in parts))
    if val is None:
        _shuffle(order)
        val = n // 10
    return Splits(
        _take(info, train, order[: n - val]),
        _take(info, train, order[n - val :]),
        _take(info, test, np.arange(len(test[1]))),
    )


def _shuffle(order: np.ndarray) -> None:
    np.random.RandomState(SEED).shuffle(order)  # the legacy generator: the paper's split of Letter


def _take(info: DataInfo, arrays: tuple[np.ndarray, np.ndarray], indices: np.ndarray) -> Samples:
    samples, labels = (array[indices] for array in arrays)
    return Samples(samples.astype(np.float32, copy=False), labels.astype(np.int64, copy=False), info)


def _check(info: DataInfo, samples: np.ndarray, labels: np.ndarray) -> None:
    if len(samples) == 0 or samples.shape[1:] != info.sample_shape:
        raise ValueError(expected("samples", f"(N, *{info.sample_shape})", samples.shape))
    if labels.shape != (len(samples),):
        raise ValueError(expected("labels", f"({len(samples)},)", labels.shape))
    if info.num_classes < 2:
        raise ValueError(expected("num_classes", "2 or more", info.num_classes))
    wrong = labels[(labels < 0) | (labels >= info.num_classes)]
    if len(wrong):
        raise ValueError(expected("labels", f"0 to {info.num_classes - 1}", int(wrong[0])))
    with np.errstate(over="ignore"):
        finite = np.isfinite(samples.astype(np.float32, copy=False)).all()
    if not finite:
        raise ValueError("samples must be finite, got NaN or infinity")
