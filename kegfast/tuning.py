"""Which kernel runs: what ran last, and what may run."""

import torch

from kegfast import native
from kegfast.check import expected


def last_kernel() -> str:
    """What the last Tucker-2 convolution of this process ran.

    Returns:
        "direct" or "winograd" with the instruction set ("winograd avx512"), "unfused" for torch's own
        three convolutions, "none" before the first call.
    """
    return "unfused" if native._C is None else native._C.last_kernel()


class tuning:
    """Limits what the Tucker-2 kernels may do; a setter, or a context manager that restores.

    Args:
        winograd: whether 3x3 cores of stride 1 may run as Winograd's F(2x2, 3x3) where that is
            faster (default True). Its rounding error is that of the direct sum.

    Raises:
        ValueError: for something other than a bool.

    Example:
        >>> with kegfast.tuning(winograd=False):
        ...     y = layer(x)
    """

    def __init__(self, *, winograd: bool = True):
        if not isinstance(winograd, bool):
            raise ValueError(expected("winograd", "True or False", winograd))
        self._before = True
        if native._C is not None:
            self._before = native._C.tucker2_winograd()
            native._C.set_tucker2_winograd(winograd)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        if native._C is not None:
            native._C.set_tucker2_winograd(self._before)


def note_unfused() -> None:
    """Records that torch's own convolutions ran (nothing while a compiler traces)."""
    if native._C is not None and not torch.compiler.is_compiling():
        native._C.note_unfused()
