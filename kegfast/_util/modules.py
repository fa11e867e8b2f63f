"""What is done to modules as a whole: copies, train and eval mode for a while."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from kegfast._util.check import expected

Kind = TypeVar("Kind", bound=nn.Module)


def clone(model: nn.Module) -> nn.Module:
    """A deep copy, also of a pruned model, whose masked weights torch itself does not copy."""
    derived = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in derived})


def submodule(model: nn.Module, name: str, kind: type[Kind]) -> Kind:
    """The submodule of that name.

    Raises:
        TypeError: it is of another kind.
    """
    found = model.get_submodule(name)
    if not isinstance(found, kind):
        raise TypeError(expected(name, f"a {kind.__name__}", found))
    return found


def two(numbers: Sequence[int]) -> tuple[int, int]:
    """The pair that a convolution over images keeps of its geometry; torch's types leave its length open."""
    vertical, horizontal = numbers
    return vertical, horizontal


def channels_last(model: Kind) -> Kind:
    """The model itself, with its convolutions' weights in that memory format."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Gives every module its own mode back at the end of the block."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The whole model in one mode, within the block."""
    with modes_kept(model):
        model.train(training)
        yield


def evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """The whole model in eval mode, within the block."""
    return in_mode(model, training=False)
