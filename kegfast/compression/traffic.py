"""What passes through a model's layers: modes for a while, shapes, rows of channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.check import accepts
from kegfast._util.inputs import Arguments, Inputs, call, copied, named_tensors, only_input
from kegfast._util.modules import evaluation
from kegfast.compression.surgery import Site


@dataclass
class Traffic:
    """The shapes of one layer's inputs and outputs, for each call in one forward pass of the model."""

    inputs: list[tuple[int, ...]] = field(default_factory=list)  # (N, C, H, W) or (..., C)
    outputs: list[tuple[int, ...]] = field(default_factory=list)


@torch.no_grad()
def trace(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> dict[str, Traffic]:
    """Runs the model once and notes the shapes at every site that ran, call by call.

    Raises:
        ValueError: the model does not take `inputs`.
    """
    traffic: dict[str, Traffic] = {}
    handles = []
    for site in sites:

        def note(
            _: nn.Module, args: Arguments, kwargs: Mapping[str, Any], out: Tensor, name: str = site.name
        ) -> None:
            calls = traffic.setdefault(name, Traffic())
            calls.inputs.append(tuple(only_input(args, kwargs).shape))
            calls.outputs.append(tuple(out.shape))

        handles.append(site.module.register_forward_hook(note, with_kwargs=True))
    try:
        with evaluation(model), accepts("example_input", inputs):
            call(model, copied(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return traffic


def rows_of(x: Tensor, linear: bool) -> Tensor:  # (N, C, H, W), (C, H, W) or (..., C) -> (rows, C)
    """One row of channels per pixel, or per vector of a Linear."""
    return x.reshape(-1, x.shape[-1]) if linear else x.movedim(-3, -1).flatten(0, -2)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of numbers, one entry per sample, in whatever a model returns."""
    return [part for _, part in named_tensors(output) if part.is_floating_point() and part.dim()]


def answers_of(output: Any) -> Tensor | None:  # (N,)
    """The class of each sample, where a model returns one table of logits; None where it does not."""
    logits = logits_of(output)
    return None if logits is None else logits.argmax(1)


def logits_of(output: Any) -> Tensor | None:  # (N, C)
    """The one table of numbers that a classifier returns; None for anything else."""
    found = tensors_of(output)
    return found[0] if len(found) == 1 and found[0].dim() == 2 and found[0].shape[1] > 1 else None
