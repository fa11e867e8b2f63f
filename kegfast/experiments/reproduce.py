"""`kegfast reproduce`: one data set of the paper, from its teacher to its table."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kegfast import data
from kegfast._util.files import load_weights, save_tensors
from kegfast.data import DataInfo, Splits
from kegfast.experiments import tables
from kegfast.experiments.networks import street_digits
from kegfast.experiments.paper import METHODS, PROTOCOLS, PUBLISHED, Paper, paper
from kegfast.experiments.study import RANKS, Study
from kegfast.training import train
from kegfast.training.processes import main_first, place

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What `reproduce` found.

    Attributes:
        study: its cells, teacher and sources.
        rows: the table; see `kegfast.experiments.tables.rows`.
        left: cells that the time did not suffice for.
        report: the page.
    """

    study: Study
    rows: list[dict[str, Any]]
    left: list[str]
    report: Path


def reproduce(
    dataset: str,
    output: str | Path,
    *,
    root: str | Path | None = None,
    teacher: str | Path | None = None,
    students: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    ranks: Sequence[str] | None = None,
    seconds: float | None = None,
    protocol: Literal["equal", "paper"] = "equal",
    amp: bool = False,
    progress: bool = False,
    **budget: int | None,
) -> Result:
    """Compute what is missing of one data set's table, and write its report.

    Every finished cell is kept in `output`, and a later call with the same budget continues there.

    Args:
        dataset: one of the paper's: a key of `kegfast.experiments.paper.PAPERS`.
        output: folder for results, weights and report.html.
        root: folder of the data sets; OpenML is asked when None.
        teacher: weights of the teacher; it is trained here when None.
        students: the paper's numbers of students, all when None.
        seeds: one run of everything per seed; the teacher stays.
        methods: of `kegfast.experiments.paper.METHODS`, or its `PUBLISHED` under the published protocol;
            all when None.
        ranks: of `kegfast.experiments.study.RANKS`; None: see `Study.run`. The published are the paper's.
        seconds: start no further cell after that time.
        protocol: of `kegfast.experiments.paper.PROTOCOLS`.
        amp: compute in bfloat16 where torch's autocast deems it safe.
        progress: show bars on a terminal.
        budget: fields of `kegfast.experiments.paper.Config` that shall differ from the data set's or the
            protocol's.

    Raises:
        ValueError: an argument is none of these, or `output` holds results of another budget or teacher.
        OSError: the data or the weights cannot be read.
    """
    experiment, output = paper(dataset), Path(output)
    _check_known("protocol", [protocol], PROTOCOLS)
    given = {key: n for key, n in budget.items() if n is not None}
    config = replace(experiment.config, protocol=protocol, amp=amp, **PROTOCOLS[protocol] | given)
    students = list(experiment.students) if students is None else list(students)
    _check_known("students", students, experiment.students)
    known, kinds = (PUBLISHED, RANKS[:1]) if protocol == "paper" else (METHODS, RANKS)
    _check_known("methods", methods := list(known if methods is None else methods), known)
    _check_known("ranks", kinds if ranks is None else ranks, kinds)
    ranks = kinds if protocol == "paper" else ranks
    info, splits = _data(dataset, root)
    with main_first():
        model = _teacher(experiment, info, splits, output, teacher, progress)
    study = Study(experiment, info, splits, model, output, config, progress)
    left = study.run(students, seeds, methods, ranks, seconds)
    rows = tables.rows(study, students, seeds)
    report = output / "report.html"
    if place()[0] == 0:
        tables.page(study, rows, seeds[0], report)
    return Result(study, rows, left, report)


def _check_known(name: str, values: Sequence[Any], known: Any) -> None:
    wrong = [value for value in values if value not in known]
    if wrong or not values:
        raise ValueError(
            f"{name} must be of {', '.join(map(str, known))}, got {', '.join(map(str, wrong)) or 'none'}"
        )


def _data(dataset: str, root: str | Path | None) -> tuple[DataInfo, Splits | None]:
    """The data. Where SVHN is missing, digits from street photographs to test with; where these are, None.

    Its teacher alone allows what the paper is about.
    """
    try:
        splits = data.load(dataset, root)
    except FileNotFoundError as error:
        if dataset != "svhn":
            raise
        stand_in = street_digits(root)
        left = "agreement with the teacher only" if stand_in is None else f"tested on {stand_in.info.name}"
        log.warning("%s; going on without: %s", error, left)
        return data.describe(dataset), stand_in
    return splits.info, splits


def _teacher(
    experiment: Paper,
    info: DataInfo,
    splits: Splits | None,
    output: Path,
    weights: str | Path | None,
    progress: bool,
) -> nn.Module:
    """The teacher of a file, or one trained here, which is kept in `output`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = experiment.build()
    own = output / "teacher.safetensors"
    if weights is not None or own.exists():
        return load_weights(model, own if weights is None else weights)
    if splits is None or not len(splits.train):
        raise ValueError(f"teacher must be given: there are no data of {info.name} to train one")
    checkpoint = output / "teacher.pt"
    train(model, splits.train, checkpoint=checkpoint, resume=True, progress=progress, **experiment.training)
    save_tensors(own, model.state_dict())
    checkpoint.unlink(missing_ok=True)
    return model
