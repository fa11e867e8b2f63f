"""Optimizers by name, as `train` and `distill` take them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from kegfast._util import check
from kegfast._util.check import expected

OptimizerName = Literal["adam", "adamw", "sgd"]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def make_optimizer(
    optimizer: OptimizerName | MakeOptimizer,
    parameters: list[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    decay_vectors: bool = True,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of that name; "sgd" has Nesterov momentum 0.9.

    Args:
        optimizer: a name, or a function from the parameters to an optimizer, which brings its own options.
        parameters: what it trains.
        lr: the learning rate.
        weight_decay: as torch's optimizers define it.
        decay_vectors: whether it holds for tensors of one dimension too, biases and normalization.
        fused: one kernel a step; torch's default on a CPU is a loop of small ones over the parameters.

    Raises:
        TypeError: for a function that makes no optimizer.
        ValueError: for another name, or a number out of its range.
    """
    if callable(optimizer):
        made = optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(expected("optimizer", "a function to a torch optimizer", made))
        return made
    if optimizer not in ("adam", "adamw", "sgd"):
        raise ValueError(expected("optimizer", "'adam', 'adamw', 'sgd' or a function", optimizer))
    check.number("lr", lr, above=0)
    check.number("weight_decay", weight_decay, least=0)
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": weight_decay}]
    if not decay_vectors:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=fused)
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, fused=fused)
