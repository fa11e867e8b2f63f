"""What a model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.

Tensors of one dimension or more hold one entry per sample in their first; anything else beside them, such as
a flag, belongs to the whole batch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.check import expected

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
"""One batch of inputs."""
Arguments = tuple[Any, ...]
"""What a hook is given of a call by position."""

LABELS = ("labels", "label")
"""Keys under which batches that are mappings keep the classes."""


def as_inputs(argument: str, value: Any, *, alike: bool = True) -> Inputs:
    """The value as inputs: a list as a tuple, any mapping as a dict.

    Args:
        argument: the name of the caller's argument, for errors.
        value: what the caller gave.
        alike: whether all tensors must hold the same number of samples, which cutting and joining need.

    Raises:
        TypeError: it holds no tensor, or keys that are no names.
        ValueError: its tensors hold different numbers of samples.
    """
    what = "a tensor, or a tuple or a dict of tensors"
    if isinstance(value, Mapping):
        value = dict(value)
        if not all(isinstance(key, str) for key in value):
            raise TypeError(expected(argument, f"{what} by the names of the model's arguments", value))
    elif isinstance(value, list | tuple):
        value = tuple(value)
    elif not isinstance(value, Tensor):
        raise TypeError(expected(argument, what, value))
    if not tensors_in(value):
        raise TypeError(expected(argument, what, value))
    if alike and len({len(tensor) for tensor in tensors_in(value) if tensor.dim()}) > 1:
        raise ValueError(expected(argument, "tensors of as many samples each", value))
    return value


def call(model: nn.Module | Callable[..., Any], inputs: Inputs) -> Any:
    """What the model answers."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors_in(inputs: Inputs) -> list[Tensor]:
    """The tensors among the inputs, in their order."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [x for x in ([inputs] if isinstance(inputs, Tensor) else values) if isinstance(x, Tensor)]


def count(inputs: Inputs) -> int:
    """The number of samples."""
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 1)


def each(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs with a function of every tensor in its place."""

    def change(x: Any) -> Any:
        return function(x) if isinstance(x, Tensor) else x

    if isinstance(inputs, Mapping):
        return {name: change(x) for name, x in inputs.items()}
    return tuple(map(change, inputs)) if isinstance(inputs, tuple) else change(inputs)


def move(inputs: Inputs, device: torch.device | str | None) -> Inputs:
    """The inputs on a device, without waiting for it."""
    return each(lambda x: x.to(device, non_blocking=True), inputs)


def copied(inputs: Inputs) -> Inputs:
    """The same values in memory of their own, for models that may write over what they are given."""
    return each(Tensor.clone, inputs)


def take(inputs: Inputs, index: slice | Tensor) -> Inputs:
    """Some of the samples."""
    return each(lambda x: x[index] if x.dim() else x, inputs)


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """The samples in consecutive parts of at most `size`."""
    total = count(inputs)
    return [take(inputs, slice(start, start + size)) for start in range(0, total, size)]


def concat(parts: Sequence[Inputs]) -> Inputs:
    """The samples of several inputs of one structure, in their order.

    Raises:
        ValueError: the parts differ in structure or in the shape of a sample.
    """
    kinds = {_structure(part): part for part in parts}
    if len(kinds) > 1:
        raise ValueError(expected("inputs", "alike in every batch", tuple(kinds.values())[:2]))
    flat = zip(*map(tensors_in, parts), strict=True)
    joined = iter([torch.cat(xs) if xs[0].dim() else xs[0] for xs in flat])
    return each(lambda _: next(joined), parts[0])


def to_like(inputs: Inputs, like: Tensor) -> Inputs:
    """The inputs on a tensor's device, and what is floating-point in its dtype."""
    return each(lambda x: x.to(like) if x.is_floating_point() else x.to(like.device), inputs)


def unpack(argument: str, batch: Any, model: nn.Module | None = None) -> tuple[Inputs, Any]:
    """(inputs, labels) of what a data set or loader yields; None where there are no labels.

    A lone tensor is the inputs, and so is a mapping, less what it keeps under one of `LABELS`. The first
    entry of a tuple or list is the inputs, itself a tensor, tuple or mapping; the second is the labels. Where
    a model is given, its forward decides: a mapping keeps the entries that its parameters name, and the
    first tensors of a tuple, one for each parameter without a default, are the inputs.

    Raises:
        TypeError, ValueError: the batch is none of these.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        rest = {name: x for name, x in batch.items() if name not in LABELS}
        rest = {name: x for name, x in rest.items() if _takes(model, name)} or rest
        return as_inputs(argument, rest), next((batch[name] for name in LABELS if name in batch), None)
    if isinstance(batch, tuple | list) and batch:
        several = _required(model) if isinstance(batch[0], Tensor) else 1
        found = tuple(batch[:several]) if several > 1 else batch[0]
        return as_inputs(argument, found), batch[several] if len(batch) > several else None
    raise TypeError(expected(argument, "batches of inputs or (inputs, labels)", batch))


def _parameters(model: nn.Module | None) -> list[inspect.Parameter] | None:
    """Those of forward; None where nothing tells them."""
    try:
        return None if model is None else list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _takes(model: nn.Module | None, name: str) -> bool:
    """Whether it may be given by keyword, as far as one can tell."""
    found = _parameters(model)
    return found is None or any(name == p.name or p.kind is inspect.Parameter.VAR_KEYWORD for p in found)


def _required(model: nn.Module | None) -> int:
    """How many positional arguments, at least one."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [p for p in _parameters(model) or () if p.kind in kinds and p.default is inspect.Parameter.empty]
    return max(1, len(found))


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returns, however nested, named by its keys, fields and places."""
    if isinstance(output, Tensor):
        yield name, output
        return
    if isinstance(output, Mapping):
        parts = [(str(key), part) for key, part in output.items()]
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [(part.name, getattr(output, part.name)) for part in fields(output)]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        parts = list(zip(output._fields, output, strict=True))
    elif isinstance(output, tuple | list):
        parts = [(str(place), part) for place, part in enumerate(output)]
    else:
        return
    for key, part in parts:
        yield from named_tensors(part, f"{name}.{key}" if name else key)


def _structure(inputs: Inputs) -> tuple[Any, ...]:
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    tensors = tensors_in(inputs)
    return type(inputs), names, tuple((x.dim(), *x.shape[1:]) for x in tensors)


def only_input(args: Arguments, kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer, which comes first, however it was given."""
    return args[0] if args else next(iter(kwargs.values()))
