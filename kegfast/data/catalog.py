"""The data sets by name: where each lies, how it is read, and how its samples are prepared.

Layout of a root folder:

    mnist/, fashion-mnist/      {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
    svhn/                       {train,test}_32x32.mat
    uci/pendigits/              pendigits_{train,test}_R.dat
    uci/letter/                 letter_R.dat
    uci/statlog-shuttle/        statlog-shuttle_{train,test}_R.dat
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kegfast._util.extras import extra
from kegfast.data.formats import Arrays, read_idx, read_mat, read_table
from kegfast.data.splits import DataInfo, Splits, make_splits

SIDE = 32
"""Side of the images, to which smaller ones are resized."""


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        info: its metadata.
        folder: its place under the root.
        files: its files, training then test; one file is split 7:1:2.
        read: reads one of `files` (for IDX: a pair of them).
        openml: its OpenML name and how many of the rows there, from the first, are training rows; None
            where OpenML has no copy in a known layout.
        val: validation samples at the end of the training set; None takes a tenth at random.
    """

    info: DataInfo
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Arrays]
    openml: tuple[str, int] | None
    val: int | None = None


def _read_idx_pair(images: Path) -> Arrays:
    labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    return read_idx(images)[:, None], read_idx(labels).astype(np.int64)


_IDX = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")

ENTRIES = {
    entry.info.name: entry
    for entry in (
        Entry(
            DataInfo("mnist", 10, (1, SIDE, SIDE), (0.1307,), (0.3081,)),
            "mnist", _IDX, _read_idx_pair, ("mnist_784", 60_000), val=5_000,
        ),
        Entry(
            DataInfo("fashion-mnist", 10, (1, SIDE, SIDE), (0.2856,), (0.3385,)),
            "fashion-mnist", _IDX, _read_idx_pair, ("Fashion-MNIST", 60_000), val=5_000,
        ),
        Entry(
            DataInfo("svhn", 10, (3, SIDE, SIDE), (0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971)),
            "svhn", ("train_32x32.mat", "test_32x32.mat"), read_mat, None, val=5_000,
        ),
        Entry(
            DataInfo("pendigits", 10, (16,)),
            "uci/pendigits", ("pendigits_train_R.dat", "pendigits_test_R.dat"), read_table,
            ("pendigits", 7_494),
        ),
        Entry(
            DataInfo("letter", 26, (16,)),
            "uci/letter", ("letter_R.dat",), read_table, ("letter", 20_000),
        ),
        Entry(
            DataInfo("shuttle", 7, (9,)),
            "uci/statlog-shuttle", ("statlog-shuttle_train_R.dat", "statlog-shuttle_test_R.dat"),
            read_table, ("shuttle", 43_500),
        ),
    )
}  # fmt: skip


DIGITS = DataInfo("digits", 10, (1, SIDE, SIDE), (0.3053,), (0.3565,))


def load_digits() -> Splits:
    """scikit-learn's bundled digits (1,797 of 8x8), shuffled and split 7:1:2."""
    with extra("data"):
        from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return make_splits(DIGITS, (_prepare(pixels, DIGITS), labels))


def load_entry(entry: Entry, root: Path | None) -> Splits:
    """Read a data set from `root`, or fetch it from OpenML into scikit-learn's cache.

    Raises:
        FileNotFoundError: it is not there; the message says where to put which files.
        ValueError: its files are damaged.
    """
    parts = _from_openml(entry) if root is None else _from_files(entry, root)
    prepared = [(_prepare(samples, entry.info), labels) for samples, labels in parts]
    return make_splits(entry.info, *prepared, val=entry.val)


def _from_files(entry: Entry, root: Path) -> list[Arrays]:
    folder = root / entry.folder
    try:
        return [entry.read(folder / file) for file in entry.files]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{entry.info.name}: {error.filename} is missing; {_advice(entry)}"
        ) from error


def _from_openml(entry: Entry) -> list[Arrays]:
    if entry.openml is None:
        raise FileNotFoundError(f"{entry.info.name}: has to be given as files; {_advice(entry)}")
    with extra("data"):
        from sklearn.datasets import fetch_openml

    name, train = entry.openml
    try:
        found = fetch_openml(name, version=1, as_frame=False, parser="liac-arff", delay=0.5)
    except OSError as error:
        raise FileNotFoundError(
            f"{entry.info.name}: OpenML cannot be reached ({error}); {_advice(entry)}"
        ) from error
    labels = np.unique(found.target, return_inverse=True)[1]  # classes in the order of their names
    parts = [(found.data[rows], labels[rows]) for rows in (slice(train), slice(train, None))]
    parts = [part for part in parts if len(part[1])]
    if entry.info.mean:
        side = round((found.data.shape[1] / len(entry.info.mean)) ** 0.5)
        return [(x.astype(np.uint8).reshape(-1, len(entry.info.mean), side, side), y) for x, y in parts]
    return [((x - x.mean(0)) / x.std(0, ddof=1), y) for x, y in parts]


def _advice(entry: Entry) -> str:
    return (
        f"put {' and '.join(entry.files)} (with their labels) into <root>/{entry.folder} and give that root"
    )


def _prepare(samples: np.ndarray, info: DataInfo) -> np.ndarray:
    """Resize images (N, C, H, W) uint8 to their `info` and normalize them; tables come normalized."""
    if not info.mean:
        return samples
    images = torch.tensor(samples)
    size = info.sample_shape[1:]
    if images.shape[2:] != size:
        # On bytes this is Pillow's bilinear resize, to the bit.
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    return images.float().div_(255).sub_(mean).div_(std).numpy()
