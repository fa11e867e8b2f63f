"""One voice for argument errors: the argument's name, what was expected, what came."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, cast

import torch
from torch import nn


def describe(value: object) -> str:
    """A short picture of a value: shape, dtype and device for a tensor, type and repr otherwise."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        article = "an" if dtype.startswith("int") else "a"
        return f"{article} {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, tuple | list) and any(isinstance(part, torch.Tensor) for part in value):
        return f"a {type(value).__name__} of {', '.join(map(describe, value))}"
    if isinstance(value, Mapping) and any(isinstance(part, torch.Tensor) for part in value.values()):
        parts = ", ".join(f"{name!r}: {describe(part)}" for name, part in value.items())
        return f"a {type(value).__name__} of {parts}"
    text = " ".join(repr(value).split())
    if len(text) > 80:
        text = text[:77] + "..."
    return f"{text} ({type(value).__name__})"


def expected(argument: str, what: str, got: object) -> str:
    """The message of a ValueError or TypeError about one argument.

    Args:
        argument: the argument's name as the caller wrote it.
        what: what would have been right, as a noun phrase.
        got: the value that came.
    """
    return f"{argument} must be {what}, got {describe(got)}"


def count(argument: str, value: Any, least: int = 1) -> int:
    """The value, which must be an int of at least `least`.

    Raises:
        TypeError: for anything but an int.
        ValueError: for one below `least`.
    """
    what = "a positive int" if least == 1 else f"an int of at least {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(expected(argument, what, value))
    if value < least:
        raise ValueError(expected(argument, what, value))
    return value


def flag(argument: str, value: Any) -> bool:
    """The value, which must be a bool.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(expected(argument, "True or False", value))
    return value


def counts(**values: Any) -> None:
    """`count` of each argument by its name, from 1."""
    for argument, value in values.items():
        count(argument, value)


def seed(argument: str, value: Any) -> int:
    """The value, which must be a seed that torch takes: an int of 64 bits, negative or not.

    Raises:
        TypeError: for anything but an int.
        ValueError: for one beyond 64 bits.
    """
    if not isinstance(value, int):
        raise TypeError(expected(argument, "an int", value))
    if not -(2**63) <= value < 2**64:
        raise ValueError(expected(argument, "an int of 64 bits", value))
    return value


def number(
    argument: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """The value, which must be a finite number above one bound, or in [least, most].

    Raises:
        TypeError: for anything but a number.
        ValueError: for one that is not finite or out of bounds.
    """
    what = "a finite number"
    if most < math.inf:
        what = f"a number in [{least:g}, {most:g}]"
    elif above > -math.inf:
        what += f" above {above:g}"
    elif least > -math.inf:
        what += f" of at least {least:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(expected(argument, what, value))
    value = cast(float, value)
    if not (math.isfinite(value) and value > above and least <= value <= most):
        raise ValueError(expected(argument, what, value))
    return value


def sizes(argument: str, value: Any) -> tuple[int, ...]:
    """The value as a tuple, which must hold one positive int or more: the shape of a sample.

    Raises:
        TypeError: for anything but a sequence of ints.
        ValueError: for none, or one below 1.
    """
    what = "a sequence of positive ints"
    ints = isinstance(value, tuple | list) and all(isinstance(n, int) for n in value)
    if not ints:
        raise TypeError(expected(argument, what, value))
    if not value or min(value) < 1:
        raise ValueError(expected(argument, what, value))
    return tuple(value)


def shares(argument: str, weights: Any, parts: int) -> list[float]:
    """The weights of so many parts, scaled to sum to one; equal shares for None.

    Raises:
        TypeError: for anything but numbers.
        ValueError: for another count of them, or one that is not above 0.
    """
    if weights is None:
        return [1 / parts] * parts
    if not isinstance(weights, tuple | list) or len(weights) != parts:
        raise ValueError(expected(argument, f"{parts} numbers above 0", weights))
    for weight in weights:
        number(argument, weight, above=0)
    total = sum(weights)
    return [weight / total for weight in weights]


def batches(ndim: int = 2, least: int = 1, **tensors: Any) -> None:
    """Checks batches of floating-point values that belong together: of one size, on one device.

    Args:
        ndim: how many dimensions each has at least.
        least: how many samples.
        **tensors: by their arguments' names; the first is what the others must fit.

    Raises:
        TypeError: for anything but floating-point tensors.
        ValueError: for another shape, size or device.
    """
    first = next(iter(tensors.values()))
    for argument, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(expected(argument, "a floating-point tensor", x))
        if x.ndim < ndim or len(x) < least:
            what = f"a batch of at least {least}, with {ndim} dimensions or more"
            raise ValueError(expected(argument, what, x))
        if len(x) != len(first) or x.device != first.device:
            raise ValueError(expected(argument, f"a batch of {len(first)} on {first.device}", x))


def device(argument: str, value: Any) -> torch.device:
    """The torch device of that name, which must be one that holds values here.

    Raises:
        ValueError: for any other, "meta" among them.
    """
    try:
        found = torch.empty(0, device=value).device
        torch.zeros(1, device=found).item()  # meta has no values
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(expected(argument, "one that this torch can use", value)) from error
    return found


def placement(device: Any, dtype: Any) -> dict[str, Any]:
    """`device` and `dtype` of a layer's parameters, each or None, as torch's own constructors take them.

    Raises:
        TypeError: for anything but a floating-point dtype.
        ValueError: for a device that this torch does not have; "meta" is one.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(expected("dtype", "a floating-point torch.dtype", dtype))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(expected("device", "one that this torch can use", device)) from error
    return {"device": device, "dtype": dtype}


def trained(argument: str, *models: nn.Module) -> list[nn.Parameter]:
    """The parameters of models, the argument first, that ask for a gradient.

    Raises:
        ValueError: where none does.
    """
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(expected(argument, "a model with parameters to train", type(models[0]).__name__))
    return parameters


def depends(argument: str, value: torch.Tensor) -> None:
    """Checks that what came of an argument leads back to what shall be trained.

    Raises:
        ValueError: for a tensor that no gradient reaches.
    """
    if not value.requires_grad:
        what = "computed with gradients to what is trained, free of torch.no_grad, detach and numpy"
        raise ValueError(expected(argument, what, value))


@contextmanager
def passes_gradient(argument: str) -> Iterator[None]:
    """Turns what torch says where no gradient reaches a model's inputs into an error that names the argument.

    Args:
        argument: the model, which is known to take the inputs.

    Raises:
        ValueError: in place of torch's RuntimeError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what = "a model that passes gradients to its inputs, free of torch.no_grad, detach and numpy"
        raise ValueError(f"{argument} must be {what}: {str(error).partition(chr(10))[0]}") from error


@contextmanager
def accepts(argument: str, got: object, model: str = "model") -> Iterator[None]:
    """Turns what a model says about an input that does not fit it into an error that names the argument.

    Args:
        argument: the argument that the input comes from.
        got: the input.
        model: the name of the model that is called in the block.

    Raises:
        ValueError: in place of the errors with which torch's layers refuse an input.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{expected(argument, f'what the {model} takes', got)}: {reason}") from error
