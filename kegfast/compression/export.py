"""Leaving torch: factored layers as the plain convolutions that every other tool knows."""

import warnings
from functools import wraps
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kegfast._util.check import accepts, expected
from kegfast._util.extras import extra
from kegfast._util.files import atomic_write
from kegfast._util.inputs import Inputs, as_inputs, call, named_tensors, tensors_in
from kegfast._util.modules import clone
from kegfast.compression.surgery import (
    replace_all,
    spell_out_addends,
    spell_out_pools,
    to_change,
    unfused,
    unwrap,
)
from kegfast.nn import TuckerConv2d


def unfuse(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Every TuckerConv2d as three plain convolutions on the same parameters.

    For tools that know only torch's own layers: quantization, pruning, other exporters. The state
    dict keeps its names, except below layers with a fused ReLU.

    Args:
        model: with fused layers.
        inplace: change the model itself (default), else a copy of it, with parameters of its own.

    Raises:
        TypeError: for something other than a module and a bool.
    """
    model = to_change(model, inplace)
    spell_out_addends(model)
    spell_out_pools(model)
    return replace_all(model, _is_fused, unfused)


def _is_fused(module: nn.Module) -> TypeGuard[TuckerConv2d]:
    return isinstance(module, TuckerConv2d)


def export_onnx(model: nn.Module, path: str | Path, example_input: Any) -> None:
    """Writes the model as an ONNX file, atomically; a factored layer becomes three Conv nodes.

    Needs the extra `onnx`.

    Args:
        model: any module; it stays as it is.
        path: the file.
        example_input: one input of the model (a tensor, a tuple of them, or a mapping by keyword). Their
            batch size is left open in the file if it is above 1; all must share it for that.

    Outputs in a mapping or with named fields keep their names (`box.left` where they are nested).

    Raises:
        TypeError: no module, or an example that is no tensor with a batch dimension.
        ValueError: an example that the model does not take.
        MissingExtra: onnx or onnxscript is not installed.
    """
    with extra("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    inputs = as_inputs("example_input", example_input, alike=False)
    tensors = tensors_in(inputs)
    if not all(part.ndim for part in tensors):
        raise TypeError(expected("example_input", "tensors with a batch dimension", example_input))
    plain = unfuse(clone(unwrap(model))).eval()
    names = _name_outputs(plain, inputs)
    alike = len(tensors[0]) > 1 and len({len(part) for part in tensors}) == 1
    batch = {0: torch.export.Dim("batch", min=1)} if alike else None
    keywords = inputs if isinstance(inputs, dict) else None
    args = () if keywords is not None else inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = (batch,) * len(args) if keywords is None else dict.fromkeys(keywords, batch)
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            args,
            temporary,
            kwargs=keywords,
            output_names=names,
            dynamo=True,
            external_data=False,
            dynamic_shapes=None if batch is None else shapes,
            verbose=False,
        )


@torch.no_grad()
def _name_outputs(model: nn.Module, inputs: Inputs) -> list[str] | None:
    """The names of its outputs, which it returns as a plain tuple from now on; None where they have none."""
    with accepts("example_input", inputs):
        output = call(model, inputs)
    if isinstance(output, Tensor | list) or type(output) is tuple:
        return None
    forward = model.forward

    @wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in named_tensors(forward(*args, **kwargs)))

    model.forward = flat
    return [name for name, _ in named_tensors(output)]
