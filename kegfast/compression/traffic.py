"""What passes through a model's layers: modes for a while, shapes, rows of channels."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.check import accepts
from kegfast.compression.surgery import Site

Inputs = tuple[Tensor, ...]


@dataclass
class Traffic:
    """The shapes of one layer's inputs and outputs, for each call in one forward pass of the model."""

    inputs: list[tuple[int, ...]] = field(default_factory=list)  # (N, C, H, W) or (..., C)
    outputs: list[tuple[int, ...]] = field(default_factory=list)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@torch.no_grad()
def trace(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> dict[str, Traffic]:
    """Runs the model once and notes the shapes at every site that ran, call by call.

    Raises:
        ValueError: the model does not take `inputs`.
    """
    traffic: dict[str, Traffic] = {}
    handles = []
    for site in sites:

        def note(_: nn.Module, args: Inputs, out: Tensor, name: str = site.name) -> None:
            calls = traffic.setdefault(name, Traffic())
            calls.inputs.append(tuple(args[0].shape))
            calls.outputs.append(tuple(out.shape))

        handles.append(site.module.register_forward_hook(note))
    try:
        with evaluation(model), accepts("example_input", inputs[0] if len(inputs) == 1 else inputs):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return traffic


def rows_of(x: Tensor, linear: bool) -> Tensor:  # (N, C, H, W) or (..., C) -> (rows, C)
    """One row of channels per pixel, or per vector of a Linear."""
    return x.flatten(0, -2) if linear else x.movedim(1, -1).flatten(0, -2)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of numbers in whatever a model returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    if isinstance(output, str) or not hasattr(output, "__iter__"):
        return []
    return [tensor for part in output for tensor in tensors_of(part)]


def answers_of(output: Any) -> Tensor | None:  # (N,)
    """The class of each sample, where a model returns one table of logits; None where it does not."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        return None
    return output.argmax(1)
