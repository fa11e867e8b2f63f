"""The files in which `autotune` keeps the forms that it measured as fastest, one a kind of device."""

import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from kegfast._util.check import expected
from kegfast._util.files import parse_json, write_json
from kegfast.version import __version__

Form = TypeVar("Form", bound=str)

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where they are kept: $KEGFAST_CACHE, else kegfast/ in the user's cache folder.

    A user without a home, as a container's often is, has one in the folder for temporary files.
    """
    if chosen := os.environ.get("KEGFAST_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "kegfast"
    try:
        return Path.home() / ".cache" / "kegfast"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"kegfast-{os.getuid()}"


def versions() -> dict[str, object]:
    """What a measured time holds for, beside the device: other versions, other kernels."""
    return {
        "kegfast": __version__,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


def releases() -> dict[str, str]:
    """What a packaged table for processors holds for: a build of torch for another device changes nothing."""
    return {"kegfast": __version__, "torch": torch.__version__.split("+")[0]}


def read_choices(path: Path, forms: Collection[Form]) -> dict[str, Form]:
    """The form of each shape by a file of `write_choices`, none where other versions wrote it.

    Raises:
        ValueError: for a file that holds anything else than `forms`.
    """
    content = parse_json(path.read_bytes(), path)
    found = checked_forms(content, forms, path)
    if content.get("versions") != versions():
        _log.info("%s was measured under %s and is left aside", path, content.get("versions"))
        return {}
    return found


def checked_forms(content: object, forms: Collection[Form], path: Path) -> dict[str, Form]:
    """The form of each shape in what was read from `path`.

    Raises:
        ValueError: where it holds anything else than `forms`.
    """
    found = content.get("forms") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(f, str) and f in forms for f in found.values()):
        raise _wrong(path)
    return found


def _wrong(path: Path) -> ValueError:
    return ValueError(expected("path", "a file of forms that autotune measured", path))


def write_choices(path: Path, found: Mapping[str, str]) -> None:
    """Writes the form of each shape, whole or not at all, with the versions that it holds for."""
    write_json(path, {"versions": versions(), "forms": dict(found)})


def keep_choices(path: Path, found: Mapping[str, str], forms: Collection[str]) -> None:
    """Adds to the file what it does not know yet; where that cannot be written, says so and goes on."""
    others: dict[str, str] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = read_choices(path, forms) if path.exists() else {}
    except (OSError, ValueError) as error:
        _log.warning("%s is written anew: %s", path, error)
    try:
        write_choices(path, {**others, **found})
    except OSError as error:
        _log.warning("measured forms are not kept: %s", error)
