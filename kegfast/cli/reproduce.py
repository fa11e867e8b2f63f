"""Run a published experiment and print its table beside what was published."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kegfast._util.extras import extra
from kegfast.cli import options

DATASETS = ("mnist", "fashion-mnist", "svhn", "pendigits", "letter", "shuttle")
DISTILLATION = ("hinton", "boundary")
FRONT_DOOR = ("shrink",)
PAPERS_OWN = (
    "students", "recipe", "ranks", "teacher", "pool", "steps", "generator_steps", "generator_batch",
    "protocol", "amp",
)  # fmt: skip
SHRINKS_OWN = ("networks", "ratios", "counts", "pretrained")
"""Options that other experiments do not have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset",
        choices=DATASETS + DISTILLATION + FRONT_DOOR,
        help="data set of the KegNet paper: " + ", ".join(DATASETS) + "; or distillation on MNIST: "
        "hinton (Hinton et al. 2015), boundary (little data, and Heo et al. 2019); or shrink, "
        "`kegfast shrink` of several networks",
    )
    parser.add_argument(
        "--students", type=_numbers, metavar="1,2,3", help="the paper's students (default all)"
    )
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="default 0,1,2")
    parser.add_argument(
        "--recipe", type=_names, metavar="METHOD,...",
        help="tucker-only, uniform, gaussian, procedural, kegnet, kegfast, oracle (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=_names, metavar="paper,budget",
        help="default: the paper's for all methods, by budget for tucker-only, kegfast and oracle",
    )  # fmt: skip
    parser.add_argument(
        "--data", "--root", dest="root", type=Path, metavar="FOLDER",
        help="folder of data sets, also as --root; without it OpenML is asked",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="weights of the teacher; without them one is trained"
    )
    parser.add_argument(
        "--budget-seconds", type=options.number, metavar="N", help="start no further cell after so long"
    )
    parser.add_argument(
        "--protocol", choices=("equal", "paper"),
        help="paper: generators and students as the authors' program trains them, the choice of the epoch "
        "apart, which sees no data",
    )  # fmt: skip
    options.add_amp(parser, None)
    for name, what in (
        ("pool", "samples that each student sees"),
        ("steps", "steps of each student"),
        ("generator-steps", "steps of the generators"),
        ("generator-batch", "samples per generator and step"),
    ):
        parser.add_argument(
            f"--{name}", type=options.positive, metavar="N", help=f"{what} (default: the data set's)"
        )
    shrink = parser.add_argument_group("of shrink alone")
    shrink.add_argument("--networks", type=_names, metavar="NAME,...", help="default: all of the table")
    shrink.add_argument("--ratios", type=_ratios, metavar="2,4", help="default: each network's own")
    shrink.add_argument(
        "--counts", type=_numbers, metavar="0,256", help="real, unlabeled samples given (default 0,256)"
    )
    shrink.add_argument("--pretrained", type=Path, metavar="FOLDER", help="folder of published weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, with date and build")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/reproduce-<dataset>")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False,
        help="continue the run in --out instead of beginning anew",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    with extra("cli"):
        from rich.console import Console

    from kegfast._util.files import write_json
    from kegfast.experiments import tables
    from kegfast.experiments.reproduce import reproduce
    from kegfast.training.processes import place

    if args.dataset in DISTILLATION + FRONT_DOOR:
        (_run_shrink if args.dataset in FRONT_DOOR else _run_distillation)(args)
        return
    _refuse(args, SHRINKS_OWN)
    folder = args.out or Path("runs") / f"reproduce-{args.dataset}"
    if not args.resume and (folder / "cells.json").exists():
        raise ValueError(f"out must be an empty folder, or give --resume to continue the run in {folder}")
    result = reproduce(
        args.dataset, folder, root=args.root, teacher=args.teacher, students=args.students, seeds=args.seeds,
        methods=args.recipe, ranks=args.ranks, seconds=args.budget_seconds,
        protocol=args.protocol or "equal", amp=bool(args.amp), progress=not place()[0],
        pool=args.pool, steps=args.steps, generator_steps=args.generator_steps,
        generator_batch=args.generator_batch,
    )  # fmt: skip
    if place()[0]:
        return  # rank 0 writes
    Console().print(tables.table(result.study, result.rows))
    if result.left:
        print(f"{len(result.left)} cells are missing for lack of time; --resume computes them")
    write_json(folder / "results.json", result.rows)
    if args.json is not None:
        _write(args.json, {"rows": result.rows})
    print(f"report in {result.report}")


def _run_distillation(args: argparse.Namespace) -> None:
    """Their configurations take other seeds; budgets are those of the experiments' `Config`."""
    from dataclasses import asdict, replace
    from importlib import import_module

    with extra("cli"):
        from rich.console import Console
        from rich.table import Table

    from kegfast._util.check import expected
    from kegfast.training.processes import place

    if place()[1] > 1:
        raise ValueError(expected("dataset", f"one of {', '.join(DATASETS)} under torchrun", args.dataset))
    _refuse(args, (*PAPERS_OWN, *SHRINKS_OWN, "budget_seconds"))
    folder = args.out or Path("runs") / f"reproduce-{args.dataset}"
    if not args.resume and any(folder.glob("*.json")):
        raise ValueError(f"out must be an empty folder, or give --resume to continue the run in {folder}")
    experiment = import_module(f"kegfast.experiments.{args.dataset}")
    config = replace(experiment.Config(), seeds=tuple(args.seeds))
    found = experiment.run(folder, args.root, config, progress=True)
    table = Table("", "mean", "spread", title=f"{args.dataset}, {len(args.seeds)} seeds")
    for name, cell in found.items():
        table.add_row(name, f"{cell['mean']:.2f}", f"{cell['std']:.2f}")
    Console().print(table)
    _write(args.json or folder / "summary.json", {"config": asdict(config), "results": found})


def _run_shrink(args: argparse.Namespace) -> None:
    """Cells of networks, ratios and numbers of data; those in --out are not computed again."""
    from rich.console import Console
    from rich.table import Table

    from kegfast.experiments import shrinking

    _refuse(args, PAPERS_OWN)
    folder = args.out or Path("runs") / "reproduce-shrink"
    if not args.resume and (folder / "cells.json").exists():
        raise ValueError(f"out must be an empty folder, or give --resume to continue the run in {folder}")
    cells, left = shrinking.run(
        folder, root=args.root, pretrained=args.pretrained, names=args.networks, ratios=args.ratios,
        counts=shrinking.DATA if args.counts is None else args.counts, seeds=args.seeds,
        seconds=args.budget_seconds,
    )  # fmt: skip
    found = shrinking.rows(cells)
    table = Table(*shrinking.HEADINGS)
    for line in shrinking.lines(found):
        table.add_row(*line)
    Console().print(table)
    if left:
        print(f"{len(left)} cells are missing for lack of time; --resume computes them")
    _write(args.json or folder / "summary.json", {"rows": found, "cells": cells})


def _refuse(args: argparse.Namespace, names: Sequence[str]) -> None:
    from kegfast._util.check import expected

    for name in names:
        if (value := getattr(args, name)) is not None:
            raise ValueError(expected(name, f"left out for {args.dataset}", value))


def _write(path: Path, results: dict[str, Any]) -> None:
    """Results with the day and the build that they are of."""
    from datetime import UTC, datetime

    from kegfast import build_info
    from kegfast._util.files import write_json

    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"date": now, "build": build_info(), **results})


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _ratios(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


_numbers.__name__, _ratios.__name__ = "list of numbers", "list of numbers"
_names.__name__ = "list of names"  # what argparse calls them
