"""Results of an experiment, cell by cell: what is in the file is not computed again."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kegfast._util.check import expected
from kegfast._util.files import read_json, write_json
from kegfast.training.processes import place


class Ledger:
    """A JSON file `{"config": ..., "cells": {name: value}}`, written after every cell.

    Args:
        path: The file; an existing one is continued.
        config: What the numbers depend on. A file with another is refused.
    """

    def __init__(self, path: str | Path, config: dict[str, Any]):
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        self.cells: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def cell(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a cell, computed and written where it is missing."""
        if name not in self.cells:
            self.cells[name] = compute()
            if place()[0] == 0:
                write_json(self.path, {"config": self.config, "cells": self.cells})
        return self.cells[name]

    def _read(self) -> None:
        try:
            found = read_json(self.path)
            config, self.cells = found["config"], dict(found["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: expected an experiment's results, got another file") from error
        if config != self.config:
            raise ValueError(expected(str(self.path), f"results of {self.config}", config))


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "n": len(values)}
