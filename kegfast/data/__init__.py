"""The data sets that the paper uses, scikit-learn's digits, and a user's own arrays."""

from pathlib import Path

import numpy as np

from kegfast._util.check import expected
from kegfast.data.catalog import DIGITS, ENTRIES, load_digits, load_entry
from kegfast.data.formats import read_arrays
from kegfast.data.splits import DataInfo, Samples, Splits, make_splits

__all__ = ["NAMES", "DataInfo", "Samples", "Splits", "describe", "load"]

NAMES = ("digits", *ENTRIES)
"""The data sets that `load` knows by name."""


def load(name: str | Path, root: str | Path | None = None) -> Splits:
    """Load a data set, normalized and split, always in the same way.

    Args:
        name: one of `NAMES`, or the path of an `.npz` or `.safetensors` file of your own with `samples`
            (N, ...) floating and normalized, `labels` (N,) integers from 0, and possibly `test_samples` and
            `test_labels`. Without a test set, data is shuffled and split 7:1:2.
        root: the folder of the published files (its layout: `kegfast.data.catalog`). Without it OpenML is
            asked, by way of scikit-learn, which keeps a copy; `digits` comes with scikit-learn.

    Returns:
        `Splits(train, val, test)`: TensorDatasets of samples float32 and labels int64, each with an `info`.

    Raises:
        FileNotFoundError: the data is neither in `root` nor on OpenML; the message says what goes where.
        ValueError: `name` is unknown, or a file is damaged or holds something else.
    """
    if _is_file(name):
        return _load_own(Path(name))
    if describe(name) is DIGITS:
        return load_digits()
    return load_entry(ENTRIES[str(name)], None if root is None else Path(root))


def describe(name: str | Path) -> DataInfo:
    """Classes, shape and normalization of a data set, without reading it (but for a file of your own).

    Raises:
        ValueError: `name` is unknown.
    """
    if _is_file(name):
        return _load_own(Path(name)).info
    if name == "digits":
        return DIGITS
    if name not in ENTRIES:
        raise ValueError(expected("name", f"{', '.join(NAMES)} or an .npz or .safetensors file", name))
    return ENTRIES[str(name)].info


def _is_file(name: str | Path) -> bool:
    return Path(name).suffix in (".npz", ".safetensors")


def _load_own(path: Path) -> Splits:
    arrays = read_arrays(path)
    try:
        train = _own_part(arrays, "")
        test = _own_part(arrays, "test_") if "test_samples" in arrays else None
        info = DataInfo(path.stem, int(train[1].max(initial=0)) + 1, train[0].shape[1:])
        return make_splits(info, train, test)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _own_part(arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    for key in (f"{prefix}samples", f"{prefix}labels"):
        if key not in arrays:
            raise ValueError(expected(key, "one of the arrays", sorted(arrays)))
    samples, labels = arrays[f"{prefix}samples"], arrays[f"{prefix}labels"]
    if samples.dtype.kind != "f":
        raise ValueError(expected(f"{prefix}samples", "floating and normalized", samples.dtype))
    if labels.dtype.kind not in "iu":
        raise ValueError(expected(f"{prefix}labels", "integers", labels.dtype))
    if samples.ndim < 2 or labels.ndim != 1:
        what = f"(N, ...) and {prefix}labels (N,)"
        raise ValueError(expected(f"{prefix}samples", what, f"{samples.shape} and {labels.shape}"))
    return samples, labels
