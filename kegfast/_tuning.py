"""What the Tucker-2 kernels may do, and which form of each layer was measured as the fastest."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.inputs import Arguments, Inputs, as_inputs, call, only_input, tensors_in
from kegfast._util.modules import evaluation
from kegfast.dispatch import cpu, cuda
from kegfast.dispatch.calls import LayerCall
from kegfast.nn import TuckerConv2d
from kegfast.ops import _native
from kegfast.ops._operands import Geometry


class tuning:
    """Limits what the Tucker-2 kernels may do; a setter, or a context manager that restores.

    Args:
        winograd: whether 3x3 cores may run by Winograd where that is faster (default True): in output tiles
            of 2x2, whose rounding error is that of the direct sum. "f4" takes F(4x4, 3x3) instead, in forward
            passes of stride 1: from rank 16 up, 1.1 to 1.2 times as fast as the default, with about 2.5 times
            the rounding error in float32 (by theory up to 3).

    Raises:
        ValueError: for something other than a bool or "f4".

    Example:
        >>> with kegfast.tuning(winograd=False):
        ...     y = layer(x)
    """

    def __init__(self, *, winograd: bool | Literal["f4"] = True):
        if not (isinstance(winograd, bool | str) and winograd in (True, False, "f4")):
            raise ValueError(expected("winograd", "True, False or 'f4'", winograd))
        self._before = 0
        if _native._C is not None:
            self._before = _native._C.tucker2_winograd()
            _native._C.set_tucker2_winograd({False: 0, True: 2, "f4": 4}[winograd])

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        if _native._C is not None:
            _native._C.set_tucker2_winograd(self._before)


def autotune(model: nn.Module, example_input: Inputs, *, training: bool = False) -> dict[str, dict]:
    """Measures each form that the model's Tucker-2 layers can take; later calls take the fastest.

    The forms on the CPU: "direct" and "winograd", the fused kernel with either sum in its core, and in
    channels_last "convolutions", oneDNN's three in a row on weights that it has reordered. What was not
    measured here is looked up in a table that comes with kegfast, by instruction set and cache sizes; else
    the kernels choose by themselves. The choice holds for layers of these shapes outside
    autograd, at this batch size, memory format and number of threads, and is kept in the user's cache folder
    ($KEGFAST_CACHE, else $XDG_CACHE_HOME/kegfast or ~/.cache/kegfast) for later processes on such a
    processor with these versions of torch and kegfast.

    Args:
        model: a module with `kegfast.nn.TuckerConv2d` layers; on the CPU only float32 ones are measured.
        example_input: what the model is called with (a tensor, a tuple of them, or a mapping by keyword), in
            the batch size and memory format to tune for.
        training: on CUDA devices, measure a forward and a backward pass, else inference alone (default).

    Returns:
        Per layer shape, the times of each form: median seconds on the CPU; on CUDA devices milliseconds,
        {"eager": of calls one after another, "graph": of a CUDA graph of them}, and a form is taken where
        neither is slower than torch's convolutions.

    Raises:
        TypeError: for something other than a module and inputs with a floating-point tensor.
        ValueError: for training=True on the CPU, where training has one form.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a module", model))
    inputs = as_inputs("example_input", example_input, alike=False)
    if not any(x.is_floating_point() for x in tensors_in(inputs)):
        raise TypeError(expected("example_input", "with a floating-point tensor", example_input))
    on_cuda = tensors_in(inputs)[0].is_cuda
    if check.flag("training", training) and not on_cuda:
        raise ValueError(expected("training", "False on the CPU, where training has one form", training))
    calls = layer_calls(model, inputs)
    return cuda.tune(calls, training) if on_cuda else cpu.tune(calls)


def layer_calls(model: nn.Module, inputs: Inputs) -> list[LayerCall]:
    """Every call of a Tucker-2 layer in one forward pass in evaluation mode."""
    found: list[LayerCall] = []

    def note(layer: TuckerConv2d, args: Arguments, kwargs: Mapping[str, Any], _: Tensor) -> None:
        weights = layer.first.weight, layer.core.weight, layer.last.weight
        found.append(LayerCall(layer, only_input(args, kwargs).detach(), *weights, Geometry.of(layer.core)))

    layers = [module for module in model.modules() if isinstance(module, TuckerConv2d)]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), evaluation(model):
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
