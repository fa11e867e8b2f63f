"""Which kernel runs: what ran last, and what may run."""

import torch
from torch import Tensor, nn

from kegfast import cpu, cuda, native
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


def autotune(model: nn.Module, example_input: Tensor) -> dict[str, dict]:
    """Measures each form that the model's Tucker-2 layers can take; later calls take the fastest.

    The forms on the CPU: "direct" and "winograd", the fused kernel with either sum in its core, and
    "convolutions", torch's own three in a row. The choice holds for layers of these shapes outside
    autograd, at this batch size, memory format and number of threads, and is kept in the user's cache folder
    ($KEGFAST_CACHE, else $XDG_CACHE_HOME/kegfast or ~/.cache/kegfast) for later processes on such a
    processor with these versions of torch and kegfast.

    Args:
        model: a module with `kegfast.nn.TuckerConv2d` layers; on the CPU only float32 ones are measured.
        example_input: what the model is called with, in the batch size and memory format to tune for.

    Returns:
        Per layer shape, the times of each form: median seconds on the CPU, milliseconds on CUDA devices
        (see `kegfast.cuda.autotune`).

    Raises:
        TypeError: for something other than a module and a floating-point tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a module", model))
    if not (isinstance(example_input, Tensor) and example_input.is_floating_point()):
        raise TypeError(expected("example_input", "a floating-point tensor", example_input))
    tune = cuda.autotune if example_input.is_cuda else cpu.autotune
    return tune(model, example_input)


def note_unfused() -> None:
    """Records that torch's own convolutions ran (nothing while a compiler traces)."""
    if native._C is not None and not torch.compiler.is_compiling():
        native._C.note_unfused()
