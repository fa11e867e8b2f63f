"""Packages that only some calls need: imported there, and named with their extra where they are missing."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the message says how to get it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what the extra `name` brings.

    Args:
        name: as in pyproject.toml, for instance "compress".

    Raises:
        MissingExtra: one of them is not installed.

    Example:
        >>> with extra("compress"):
        ...     import tensorly
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "kegfast"):
            raise
        message = f"{package} is not installed; get it by: pip install 'kegfast[{name}]'"
        raise MissingExtra(message, name=error.name) from error
