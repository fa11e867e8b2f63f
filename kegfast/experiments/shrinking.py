"""`kegfast reproduce shrink`: students of several networks, cell by cell, on real test data."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kegfast.data import Splits
from kegfast.experiments.ledger import Ledger, spread
from kegfast.experiments.networks import NETWORKS, Network, network
from kegfast.recovery.front import recovery
from kegfast.recovery.judge import answers
from kegfast.training import evaluate

log = logging.getLogger(__name__)

DATA = (0, 256)
"""Numbers of real, unlabeled training images given beside the network."""


def cell_name(name: str, ratio: float, count: int, seed: int) -> str:
    """The key of one cell in the ledger."""
    return f"{name}/{ratio:g}x/{count}/{seed}"


def run(
    output: Path,
    *,
    root: Path | None,
    pretrained: Path | None,
    names: Sequence[str] | None = None,
    ratios: Sequence[float] | None = None,
    counts: Sequence[int] = DATA,
    seeds: Sequence[int] = (0, 1, 2),
    seconds: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compute what is missing.

    Args:
        output: folder for the cells, trained teachers and unfinished runs.
        root: folder of data sets.
        pretrained: folder of published weights.
        names: of `NETWORKS`, all when None.
        ratios: of parameters, each network's own when None.
        counts: of real samples given.
        seeds: one run per seed.
        seconds: start no cell after that time.

    Returns:
        All cells, and the names of those that the time did not suffice for.

    Raises:
        ValueError: a network is unknown, or its weights or data are missing.
    """
    networks = {name: network(name) for name in names or NETWORKS}
    ledger = Ledger(output / "cells.json", {"experiment": "shrink"})
    start, left = time.monotonic(), []
    for name, entry in networks.items():
        wanted = [
            (ratio, count, seed, cell_name(name, ratio, count, seed))
            for seed in seeds
            for count in counts
            for ratio in ratios or entry.ratios
        ]
        missing = [cell for cell in wanted if cell[3] not in ledger.cells]
        if not missing:
            continue
        if seconds is not None and time.monotonic() - start > seconds:
            left += [cell[3] for cell in missing]
            continue
        splits = entry.splits(root)
        teacher = entry.teacher(splits, pretrained, output / f"{name}.safetensors")
        kept: dict[int, tuple[dict[str, Tensor], float]] = {}
        for ratio, count, seed, key in missing:
            if seconds is not None and time.monotonic() - start > seconds:
                left.append(key)
                continue
            log.info("%s", key)
            folder = output / key.replace("/", "-")
            ledger.cell(key, lambda: _cell(entry, splits, teacher, ratio, count, seed, folder, kept))  # noqa: B023
    return ledger.cells, left


def _cell(
    entry: Network,
    splits: Splits,
    teacher: nn.Module,
    ratio: float,
    count: int,
    seed: int,
    folder: Path,
    kept: dict[int, tuple[dict[str, Tensor], float]],
) -> dict[str, Any]:
    info = splits.info
    normalization: dict[str, Any] = {"mean": info.mean, "std": info.std} if info.mean else {}
    data, resumed = splits.train.tensors[0][:count] if count else None, folder.exists()
    start, shared = time.process_time(), kept.get(seed)
    with recovery(
        teacher,
        info.sample_shape,
        ratio=ratio,
        data=data,
        seed=seed,
        out=folder,
        resume=True,
        **normalization,
    ) as run:
        if shared is not None:
            run.made.keep(shared[0])
            start -= shared[1]
        run.make()
        kept[seed] = run.made.kept, time.process_time() - start
        chosen = run.student()
        seconds = None if resumed else time.process_time() - start
        report = run.report
        accuracy = {name: evaluate(student, splits.test) for name, student in run.students.items()}
    assert report.chosen is not None
    assert report.before is not None
    predicted = report.predicted
    for part in folder.glob("*"):
        part.unlink()
    folder.rmdir()
    return {
        "teacher": evaluate(teacher, splits.test),
        "accuracy": accuracy[report.chosen.name],
        "before": accuracy[report.before.name],
        "best": max(accuracy.values()),
        "agreement": agreement(teacher, chosen, splits.test.tensors[0]),
        "predicted": None if predicted is None else asdict(predicted),
        "ratio": report.ratio,
        "seconds": seconds,
        "candidates": {
            one.name: {"accuracy": accuracy[one.name], "divergence": one.divergence}
            | {kind: verdict.agreement for kind, verdict in one.verdicts.items()}
            for one in report.candidates
        },
    }


def agreement(teacher: nn.Module, student: nn.Module, samples: Tensor) -> float:
    """Percent of samples that both put into one class."""
    same = answers(teacher, samples).argmax(1) == answers(student, samples).argmax(1)
    return 100 * float(same.float().mean())


HEADINGS = [
    "network",
    "ratio",
    "data",
    "teacher",
    "before",
    "after",
    "agreement",
    "predicted",
    "CPU s",
    "seeds",
]


def rows(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """The table: one row per network, ratio and number of data, over the seeds that there are.

    CPU seconds are those of cells that were not interrupted.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        name, ratio, count, _ = key.split("/")
        groups.setdefault((name, ratio, count), []).append(cell)
    found = []
    for (name, ratio, count), own in groups.items():
        row: dict[str, Any] = {"network": name, "asked": ratio, "data": int(count), "seeds": len(own)}
        for value in ("teacher", "before", "accuracy", "best", "agreement", "ratio"):
            row[value] = spread([cell[value] for cell in own])
        row["seconds"] = [cell["seconds"] for cell in own if cell["seconds"] is not None]
        row["predicted"] = [cell["predicted"] for cell in own]
        found.append(row)
    return found


def lines(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as text, in the order of `HEADINGS`."""
    return [
        [
            row["network"],
            f"{row['ratio']['mean']:.2f}x",
            str(row["data"] or "none"),
            f"{row['teacher']['mean']:.2f}",
            f"{row['before']['mean']:.2f}",
            f"{row['accuracy']['mean']:.2f} ± {row['accuracy']['std']:.2f}",
            f"{row['agreement']['mean']:.1f}",
            _predicted(row["predicted"]),
            f"{min(row['seconds']):.0f}" if row["seconds"] else "",
            str(row["seeds"]),
        ]
        for row in found
    ]


def _predicted(found: Sequence[dict[str, Any] | None]) -> str:
    known = [one for one in found if one is not None]
    if not known:
        return "unknown"
    middle, low, high = (sum(one[key] for one in known) / len(known) for key in ("agreement", "low", "high"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"
