"""Leaving torch: factored layers as the plain convolutions that every other tool knows."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kegfast._util.check import expected
from kegfast._util.extras import extra
from kegfast._util.files import atomic_write
from kegfast._util.modules import clone
from kegfast.compression.surgery import replace_all, spell_out_addends, spell_out_pools, unfused
from kegfast.nn import TuckerConv2d


def unfuse(model: nn.Module) -> nn.Module:
    """Every TuckerConv2d as three plain convolutions on the same parameters, in place.

    For tools that know only torch's own layers: quantisation, pruning, other exporters. The state
    dict keeps its names, except below layers with a fused ReLU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    spell_out_addends(model)
    spell_out_pools(model)
    return replace_all(model, lambda module: isinstance(module, TuckerConv2d), unfused)


def export_onnx(model: nn.Module, path: str | Path, example_input: Tensor | Sequence[Tensor]) -> None:
    """Writes the model as an ONNX file, atomically; a factored layer becomes three Conv nodes.

    Needs the extra `onnx`.

    Args:
        model: any module; it stays as it is.
        path: the file.
        example_input: one input of the model (a tensor, or a tuple of them). Their batch size is left
            open in the file if it is above 1; all must share it for that.

    Raises:
        TypeError: no module, or an example that is no tensor with a batch dimension.
        MissingExtra: onnx or onnxscript is not installed.
    """
    with extra("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    inputs = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
    if not inputs or not all(isinstance(part, Tensor) and part.ndim for part in inputs):
        raise TypeError(expected("example_input", "tensors with a batch dimension", example_input))
    plain = unfuse(clone(model)).eval()
    alike = len(inputs[0]) > 1 and len({len(part) for part in inputs}) == 1
    batch = {0: torch.export.Dim("batch", min=1)} if alike else None
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            inputs,
            temporary,
            dynamo=True,
            external_data=False,
            dynamic_shapes=None if batch is None else (batch,) * len(inputs),
            verbose=False,
        )
