"""One voice for argument errors: the argument's name, what was expected, what came."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def describe(value: object) -> str:
    """A short picture of a value: shape, dtype and device for a tensor, type and repr otherwise."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, tuple | list) and any(isinstance(part, torch.Tensor) for part in value):
        return f"a {type(value).__name__} of {', '.join(map(describe, value))}"
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
