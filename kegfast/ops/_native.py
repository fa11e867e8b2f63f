"""Loads the compiled part, chooses between it and the reference path, and says what ran."""

import functools
import importlib
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch.autograd import forward_ad

from kegfast._util.check import expected
from kegfast.version import __version__

Backend = Literal["auto", "native", "reference"]

_log = logging.getLogger(__name__)
_CUDA_LIBRARY = Path(__file__).parents[1] / "_cuda.so"
_backend: Backend = "auto"
# Private to torch: where one is gone nobody can tell, and its own operators run.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_traced = getattr(torch._C, "_get_tracing_state", lambda: True)


def _load() -> tuple[ModuleType | None, str]:
    try:
        compiled = importlib.import_module("kegfast._C")
    except ImportError as error:
        # Written by setup.py where nothing could be compiled.
        noted = Path(__file__).parents[1] / "_absent.txt"
        return None, noted.read_text() if noted.exists() else str(error)
    try:
        compiled.build_info()
    except ValueError as error:
        raise ValueError(f"KEGFAST_CPU_ISA: {error}") from None
    return compiled, ""


if (
    TYPE_CHECKING
):  # as if it were always there: what needs it asks `_C is None` first, or is not reached without
    from kegfast import _C

    _why_absent = ""
else:
    # Loading _C registers torch.ops.kegfast; torch itself must be loaded first, as it is above.
    _C, _why_absent = _load()


def _load_cuda() -> bool:
    """Adds the CUDA kernels, a library of their own: it needs the functions of a torch with CUDA."""
    if _C is None or torch.version.cuda is None or not _CUDA_LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        _log.warning("kegfast runs without its CUDA kernels: %s", error)
        return False
    return True


_cuda = _load_cuda()
_runs: dict[int | None, bool] = {}  # device index -> whether it runs the CUDA kernels


def runs_on(device: torch.device) -> bool:
    """Whether compiled kernels run on this device: a CUDA library may hold no code for its card or driver.

    A card is asked once, and a refusal is logged.
    """
    # torch.compile cannot trace the question; backend("native") is for the operator to refuse.
    if device.type != "cuda" or _backend == "native" or torch.compiler.is_compiling():
        return True
    if device.index not in _runs:
        why = torch.ops.kegfast.cuda_why_not(-1 if device.index is None else device.index)
        _runs[device.index] = not why
        if why:
            _log.warning("kegfast runs without its CUDA kernels on %s: %s", device, why)
    return _runs[device.index]


@functools.cache
def _warn_reference() -> None:
    _log.warning(
        "kegfast runs without its compiled kernels (%s): results are right, speed is plain torch's",
        _why_absent,
    )


def _kernels() -> set[tuple[str, str]]:
    asks = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, device: False)
    operators = "diversity_forward", "soft_target_forward", "tucker2"
    known = [operator for operator in operators if hasattr(torch.ops.kegfast, operator)]
    devices = ("cpu", "cuda")
    return {(op, device) for op in known for device in devices if asks(f"kegfast::{op}", device.upper())}


_KERNELS = _kernels()  # torch.compile cannot trace the question


def has_kernel(operator: str, device: torch.device) -> bool:
    """Whether an operator of `torch.ops.kegfast` was compiled for a device, and runs on it."""
    return (operator, device.type) in _KERNELS and runs_on(device)


def use_native() -> bool:
    """Whether operators run the compiled kernels now (says once when they are missing).

    torch.func's transforms, forward-mode differentiation, TorchScript's tracer and `torch.onnx.export` get
    torch's own operators, which they know.
    """
    if _backend == "reference" or _transformed() or _traced() is not None or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return False
    if _C is None:
        if not torch.compiler.is_compiling():  # which breaks its graph at a log
            _warn_reference()
        return False
    return True


def _choose(name: Backend) -> None:
    global _backend
    _backend = name
    if _C is not None:
        _C.unsettle()


class backend:
    """Chooses how operators run; a setter, or a context manager that restores what was.

    Args:
        name: "auto" takes compiled kernels where they exist (default), "native" insists on them (on CUDA
            also where torch's own convolutions are faster or nothing was measured), "reference" runs
            the plain torch definitions of `kegfast.reference`, as torch.func's transforms, TorchScript's
            tracer and `torch.onnx.export` do in any case.

    Raises:
        ValueError: for another name.
        RuntimeError: for "native" where the compiled part is missing.

    Example:
        >>> with kegfast.backend("reference"):
        ...     loss = kegfast.functional.diversity_loss(noises, samples)
    """

    def __init__(self, name: Backend):
        if name not in ("auto", "native", "reference"):
            raise ValueError(expected("backend", "'auto', 'native' or 'reference'", name))
        if name == "native" and _C is None:
            raise RuntimeError(f"kegfast's compiled part is missing: {_why_absent}")
        self._before = _backend
        _choose(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        _choose(self._before)


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Lets the CPU kernels use no more than one instruction set inside the block.

    Args:
        name: one of `build_info()["isa_compiled"]` that this CPU has, or "auto", the best that it has.

    Raises:
        ValueError: for another name.
        RuntimeError: where the compiled part is missing.
    """
    if _C is None:
        raise RuntimeError(f"kegfast's compiled part is missing: {_why_absent}")
    if not isinstance(name, str):
        raise ValueError(expected("name", "an instruction set's name or 'auto'", name))
    before = _C.build_info()["isa_active"]
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def build_info() -> dict[str, object]:
    """What this kegfast is: version, compiler, instruction sets, CUDA state, torch.

    Returns:
        A dict of plain values; `native` is False where the compiled part is missing, `why` says why, and
        the instruction sets and the compiler are none.
        `cuda_built` tells whether the CUDA library is there, `cuda_kernels` whether it is loaded.
    """
    info: dict[str, object] = {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "native": _C is not None,
        "cuda_built": _CUDA_LIBRARY.exists(),
        "cuda_kernels": _cuda,
    }
    if _C is None:
        info |= {"why": _why_absent, "compiler": None}
        info |= {"isa_compiled": [], "isa_detected": None, "isa_active": None}
    else:
        info.update(_C.build_info())
    return info


def last_kernel() -> str:
    """What the last Tucker-2 convolution of this process ran.

    Returns:
        "direct", "winograd" or "winograd_f4" with the instruction set ("winograd avx512"), "unfused" for
        torch's own three convolutions, "none" before the first call.
    """
    return "unfused" if _C is None else _C.last_kernel()


def note_unfused() -> None:
    """Records that torch's own convolutions ran (nothing while a compiler traces)."""
    if _C is not None and not torch.compiler.is_compiling():
        _C.note_unfused()
