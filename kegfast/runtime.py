"""Frozen networks without torch: a file that `Frozen.save` wrote, run on numpy's arrays.

>>> from kegfast.runtime import load
>>> network = load("student.kegplan")
>>> logits = network(images)

Needs numpy alone: neither this module nor `import kegfast` imports torch. csrc/kegplan.h is the same for C.
"""

import ctypes
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_LIBRARY = Path(__file__).with_name("libkegfast_runtime.so")


class Network:
    """A frozen network; `load` makes one. It may be called from several threads.

    Attributes:
        threads: how many threads share the work of a call (1).
    """

    def __init__(self, handle: int, library: ctypes.CDLL):
        self._handle, self._library = handle, library
        self._inputs, self._outputs = library.kegplan_inputs(handle), library.kegplan_outputs(handle)
        self._threads = 1
        self._shapes: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"threads must be a positive int, got {value!r}")
        self._library.kegplan_set_threads(self._handle, value)
        self._threads = value

    def __call__(self, *inputs: npt.ArrayLike) -> Array | tuple[Array, ...]:
        """What the model answered in eval mode.

        Args:
            inputs: (N, C, H, W) images or (N, C) vectors, as those of `freeze`; taken as float32.

        Returns:
            One array, or a tuple where the model returns several.

        Raises:
            ValueError: for inputs that the network does not take.
        """
        arrays = [np.ascontiguousarray(x, dtype=np.float32) for x in inputs]
        if len(arrays) != self._inputs:
            raise ValueError(f"inputs must be {self._inputs} arrays, got {len(arrays)}")
        sizes = self._sizes(arrays)
        key = tuple(x.shape for x in arrays)
        if key not in self._shapes:
            self._shapes = {key: self._output_shapes(sizes)}
        outputs = [np.empty(shape, np.float32) for shape in self._shapes[key]]
        done = self._library.kegplan_run(self._handle, sizes, _addresses(arrays), _addresses(outputs))
        if done != 0:
            raise ValueError(_error(self._library))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _sizes(self, arrays: list[Array]) -> ctypes.Array[ctypes.c_int64]:
        sizes: list[int] = []
        for x in arrays:
            if x.ndim not in (2, 4):
                raise ValueError(f"an input must be of shape (N, C, H, W) or (N, C), got {x.shape}")
            sizes += (*x.shape, 0, 0)[:4]
        return (ctypes.c_int64 * len(sizes))(*sizes)

    def _output_shapes(self, sizes: ctypes.Array[ctypes.c_int64]) -> list[tuple[int, ...]]:
        found = (ctypes.c_int64 * (4 * self._outputs))()
        if self._library.kegplan_output_sizes(self._handle, sizes, found) != 0:
            raise ValueError(_error(self._library))
        shapes = [tuple(found[i : i + 4]) for i in range(0, len(found), 4)]
        return [shape if shape[2] else shape[:2] for shape in shapes]

    def __del__(self) -> None:
        if handle := self.__dict__.pop("_handle", None):
            self._library.kegplan_free(handle)


def load(path: str | os.PathLike[str]) -> Network:
    """Reads a frozen network from a file.

    Args:
        path: of a file that `Frozen.save` wrote, by whatever machine.

    Raises:
        OSError: there is no such file, or kegfast was installed without its compiled part.
        ValueError: the file holds something else, or is damaged.
    """
    library = _library()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)}")
    handle = library.kegplan_load(os.fsencode(path))
    if not handle:
        raise ValueError(f"{os.fspath(path)}: {_error(library)}")
    return Network(handle, library)


def _addresses(arrays: list[Array]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))


def _error(library: ctypes.CDLL) -> str:
    return library.kegplan_error().decode(errors="replace")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    pointer = ctypes.c_void_p
    library.kegplan_load.argtypes, library.kegplan_load.restype = [ctypes.c_char_p], pointer
    library.kegplan_free.argtypes, library.kegplan_free.restype = [pointer], None
    library.kegplan_set_threads.argtypes = [pointer, ctypes.c_int]
    library.kegplan_set_threads.restype = None
    library.kegplan_output_sizes.argtypes = [pointer] * 3
    library.kegplan_run.argtypes = [pointer] * 4
    library.kegplan_error.argtypes, library.kegplan_error.restype = [], ctypes.c_char_p
    for count in (library.kegplan_inputs, library.kegplan_outputs):
        count.argtypes = [pointer]
    return library
