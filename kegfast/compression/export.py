"""Leaving torch: factored layers as the plain convolutions that every other tool knows."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.compression.surgery import clone, replace_all, unfused
from kegfast.files import atomic_write
from kegfast.nn import TuckerConv2d


def unfuse(model: nn.Module) -> nn.Module:
    """Every TuckerConv2d as three plain convolutions on the same parameters, in place.

    For tools that know only torch's own layers: quantisation, pruning, other exporters. The state
    dict keeps its names, except below layers with a fused ReLU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    return replace_all(model, lambda module: isinstance(module, TuckerConv2d), unfused)


def export_onnx(model: nn.Module, path: str | Path, example_input: Tensor) -> None:
    """Writes the model as an ONNX file, atomically; a factored layer becomes three Conv nodes.

    Needs the packages onnx and onnxscript (`pip install kegfast[onnx]`).

    Args:
        model: any module; it stays as it is.
        path: the file.
        example_input: one input; its batch size is left open in the file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    if not isinstance(example_input, Tensor) or not example_input.ndim:
        raise TypeError(expected("example_input", "a tensor with a batch dimension", example_input))
    plain = unfuse(clone(model)).eval()
    batch = {0: torch.export.Dim("batch", min=1)} if len(example_input) > 1 else None
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            (example_input,),
            temporary,
            dynamo=True,
            external_data=False,
            dynamic_shapes=None if batch is None else (batch,),
            verbose=False,
        )
