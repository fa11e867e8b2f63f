"""Students whose first layers are the teacher's own: these answer to each sample once and are not trained."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def tail(model: nn.Module, shared: Sequence[str]) -> nn.Module:
    """A model that takes what its layers `shared` send on, with the same parameters behind them.

    Args:
        model: one whose forward applies these layers to its input before all others. What it does in
            between, such as a ReLU, must not change the output of the last of them a second time.
        shared: names of its children.
    """
    result = copy.copy(model)
    result._modules = dict(model._modules) | {name: nn.Identity() for name in shared}
    return result


@torch.no_grad()
def head_outputs(model: nn.Module, shared: Sequence[str], samples: Tensor, batch_size: int = 128) -> Tensor:
    """What the last of the layers `shared` sends on: `tail(model)` of it is `model` of the samples."""
    found: list[Tensor] = []
    hook = model.get_submodule(shared[-1]).register_forward_hook(lambda layer, args, out: found.append(out))
    try:
        for part in samples.split(batch_size):
            model(part)
    finally:
        hook.remove()
    return torch.cat(found)
