"""Readers for the files in which the data sets are published; none of them executes anything."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from kegfast._util.extras import extra
from kegfast._util.files import read_tensors

Arrays = tuple[np.ndarray, np.ndarray]
"""Samples and integer labels."""


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the IDX format (MNIST), gzip-compressed or not.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file, or not all of it.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, dtype, ndim = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{ndim}I", content, 4)
        if zeros != 0 or dtype != 8:
            raise ValueError("no IDX header of unsigned bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error, ValueError) as error:
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
            images, labels = content["X"], content["y"]
            return images.transpose(3, 2, 0, 1), labels.ravel().astype(np.int64) % 10
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
    except (ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"{path}: expected an .npz file without pickled objects, got {error}") from error
