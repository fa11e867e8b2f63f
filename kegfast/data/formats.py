"""Readers for the files in which the data sets are published; none of them executes anything."""

import gzip
import math
import os
import struct
import zlib
from contextlib import nullcontext
from errno import EINVAL
from pathlib import Path

import numpy as np

from kegfast._util.extras import extra
from kegfast._util.files import read_tensors

MOST_DEFLATED = 1032
"""Bytes that one byte of a gzip file can stand for."""
Arrays = tuple[np.ndarray, np.ndarray]
"""Samples and integer labels."""


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the IDX format (MNIST), gzip-compressed or not.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file, or not all of it.
    """
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            most = raw.seek(0, os.SEEK_END) * MOST_DEFLATED
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if compressed else nullcontext(raw) as file:
                zeros, dtype, ndim = struct.unpack(">HBB", file.read(4))
                if zeros != 0 or dtype != 8:
                    raise ValueError("no IDX header of unsigned bytes")
                shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
                size = math.prod(shape)
                if size > most:
                    raise ValueError(f"a header of shape {shape}")
                content = file.read(size + 1)
                return np.frombuffer(content, np.uint8).reshape(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: expected a whole IDX file of bytes, got {error}") from error


def read_mat(path: Path) -> Arrays:
    """Read an SVHN file: images (N, 3, 32, 32) uint8 and labels (N,), where the digit 0 is stored as 10.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file.
    """
    with extra("data"):
        from scipy.io import loadmat

    with open(path, "rb") as file:
        try:
            content = loadmat(file)
            images, labels = content["X"].transpose(3, 2, 0, 1), content["y"].ravel()
            whole = np.array_equal(labels, labels.astype(np.int64))
            if images.dtype != np.uint8 or len(images) != len(labels) or not whole:
                raise ValueError(f"X of {images.dtype} {images.shape}, y of {labels.dtype} {labels.shape}")
            return images, labels.astype(np.int64) % 10
        except Exception as error:  # scipy has no one error for a damaged file
            raise ValueError(f"{path}: expected a MATLAB file with X and y, got {error!r}") from error


def read_table(path: Path) -> Arrays:
    """Read a UCI table: tab-separated, a header, then index, features and an integer class in each row.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file.
    """
    try:
        with open(path, encoding="ascii") as file:
            rows = np.loadtxt(file, skiprows=1, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: expected a table of numbers, got {error}") from error
    if rows.shape[0] == 0 or rows.shape[1] < 3:
        raise ValueError(f"{path}: expected index, features and class, got {rows.shape} numbers")
    largest = np.abs(rows).max(0)  # infinite and NaN ones stay
    numbers = (largest[:-1] <= np.finfo(np.float32).max).all()
    if not (numbers and largest[-1] < 2**31 and (rows[:, -1] % 1 == 0).all()):
        raise ValueError(f"{path}: expected finite numbers and whole classes, got others")
    return rows[:, 1:-1].astype(np.float32), rows[:, -1].astype(np.int64)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read named arrays from an `.npz` (without pickles) or a `.safetensors` file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file.
    """
    if path.suffix == ".safetensors":
        return {name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()}
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # numpy has no one error for a damaged file
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):
            raise
        raise ValueError(f"{path}: expected an .npz file without pickled objects, got {error}") from error
