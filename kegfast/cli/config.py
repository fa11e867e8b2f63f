"""Values for options from a TOML file or from the run that is resumed, under the command line's own."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kegfast._util.files import read_json

OPTIONS = "options.json"
"""The options of a run, in its folder."""


def default_out(command: str) -> Path:
    """The folder of a run whose --out is not given."""
    return Path("runs") / command


def with_defaults(argv: Sequence[str]) -> list[str]:
    """Put the options of `--config`, and on `--resume` those of the run itself, before the ones given.

    The file holds options by their names, `batch_size = 64` for `--batch-size 64`; a table with a command's
    name holds those for this command only.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, or holds something that is no option's value.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("command", nargs="?")
    early.add_argument("--config", type=Path)
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", action="store_true")
    if not argv or argv[0].startswith("-"):
        return list(argv)
    try:
        known, _ = early.parse_known_args(argv)
    except SystemExit as error:
        raise ValueError("--config and --out take a path") from error
    values: dict[str, Any] = {}
    if known.config is not None:
        values |= _read_toml(known.config, known.command)
    before = (known.out or default_out(argv[0])) / OPTIONS
    if known.resume and before.exists():
        values |= read_json(before)
    return [argv[0], *_tokens(values), *argv[1:]]


def _read_toml(path: Path, command: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from error
    common = {key: value for key, value in content.items() if not isinstance(value, dict)}
    return common | content.get(command, {})


def _tokens(values: Mapping[str, Any]) -> list[str]:
    """Options as the command line would spell them; argparse then checks them as it does the user's."""
    tokens = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            tokens.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list):
            tokens += [option, *map(str, value)]
        elif isinstance(value, str | int | float):
            tokens.append(f"{option}={value}")
        else:
            raise ValueError(f"{name} must be a string, number, bool or list of these, got {value!r}")
    return tokens
