"""The paper's tables from the cells of a study: rows, the printed table, the report page."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kegfast._util.extras import extra
from kegfast._util.html import Page
from kegfast.experiments.ledger import spread
from kegfast.experiments.paper import METHODS
from kegfast.experiments.pictures import grid, walk
from kegfast.experiments.sources import Sources
from kegfast.experiments.study import RANKS, Study, cell_name
from kegfast.extraction import Generators

with extra("cli"):
    from rich.box import SIMPLE
    from rich.table import Table

SHOWN = 1_000
"""Samples that the page's statistics are taken from."""


def rows(study: Study, students: Iterable[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per student, kind of ranks, method and machine that has a result.

    Each has dataset, model, student, ranks, method, accuracy (percent, one per seed; of the student that was
    chosen without data), oracle (that of the best candidate), mean, std, agreement (percent, mean
    over the held-out sources), params, ratio, published, seconds (on the CPU, of the fastest seed) and
    samples.
    """
    cells = study.ledger.cells
    found = []
    for student in students:
        for ranks in RANKS:
            for method in METHODS:
                names = [cell_name(student, ranks, method, seed) for seed in seeds]
                machines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
                for value in (cells[name] for name in names if name in cells):
                    stamp = value.get("measured", {})
                    machines.setdefault((stamp.get("processor"), stamp.get("isa_active")), []).append(value)
                found += [_row(study, student, ranks, method, values) for values in machines.values()]
    return found


def _row(study: Study, student: int, ranks: str, method: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    paper = study.paper
    row: dict[str, Any] = {
        "dataset": paper.dataset,
        "model": paper.model,
        "student": student,
        "ranks": ranks,
        "method": method,
        "params": values[0]["params"],
        "ratio": values[0]["ratio"],
        "published": paper.students[student].published.get(method),
        "seconds": min(value["seconds"] for value in values),
        "samples": values[0]["samples"],
    }
    if study.splits is not None:
        row["accuracy"] = [value["accuracy"][value["chosen"]] for value in values]
        row["oracle"] = [max(*value["accuracy"], *_looks(value)) for value in values]
        row |= {key: value for key, value in spread(row["accuracy"]).items() if key != "n"}
    if values[0].get("tested"):
        row["tested"] = values[0]["tested"] | {
            "agreement": [value["tested"]["agreement"] for value in values]
        }
    if "measured" in values[-1]:
        row["measured"] = values[-1]["measured"]
    chosen = [value["agreement"][value["chosen"]] for value in values]
    if chosen[0]:
        row["agreement"] = [sum(probe.values()) / len(probe) for probe in chosen]
    return row


def _looks(cell: dict[str, Any]) -> list[float]:
    """Accuracies on the test set while the student was taught."""
    return [accuracy for _, accuracy in cell.get("curve", [])] or cell["accuracy"]


def table(study: Study, found: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal of 80 columns."""
    result = Table(title=title(study), box=SIMPLE, padding=(0, 1, 0, 0))
    result.add_column("method", no_wrap=True)
    for name in HEADERS[3:]:
        result.add_column(name, justify="right", no_wrap=True)
    group = None
    for row in found:
        label, ranks, method, *numbers = cells(row)
        if group != (row["student"], ranks):
            group = row["student"], ranks
            result.add_row(f"[bold]{label} {ranks}")
        result.add_row(method, *numbers)
    return result


HEADERS = ("student", "ranks", "method", "published", "ours", "±", "best", "agree", "CPU s", "samples")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, by `HEADERS`."""
    known = "accuracy" in row
    return [
        f"S{row['student']} {row['ratio']:.2f}x",
        row["ranks"],
        row["method"],
        _percent(row["published"] if row["ranks"] == "paper" else None),
        _percent(row["mean"] if known else None),
        f"{row['std']:.2f}" if known and len(row["accuracy"]) > 1 else "-",
        _percent(sum(row["oracle"]) / len(row["oracle"]) if known else None),
        _percent(sum(row["agreement"]) / len(row["agreement"]) if "agreement" in row else None),
        f"{row['seconds']:.0f}",
        f"{row['samples']:,}",
    ]


def title(study: Study) -> str:
    """The data set, the teacher and its accuracy."""
    paper = study.paper
    if study.teacher_accuracy is None:
        return f"{paper.dataset}: {paper.model}, no test set: agreement with the teacher only"
    published = f"published {paper.teacher:.2f} %"
    name = study.splits.test.info.name if study.splits else paper.dataset
    where = f" on {len(study.splits.test)} {name}" if study.splits and name != paper.dataset else ""
    return f"{paper.dataset}: {paper.model}, teacher {study.teacher_accuracy:.2f} %{where} ({published})"


def page(study: Study, found: Sequence[dict[str, Any]], seed: int, path: Path) -> None:
    """Write the report: the table, then what the samples look like and how the teacher sees them."""
    result = Page(f"kegfast reproduce {study.paper.dataset}", title(study))
    result.section(
        "Accuracy",
        "Percent of the test set. 'ours' is the student that was chosen without data, by its divergence from "
        "the teacher on artificial samples of all classes; 'best' is the choice of the test set itself. "
        "'agree' is the agreement with the teacher on held-out samples of the other sources.",
    )
    result.table(HEADERS, [cells(row) for row in found])
    sources = study.sources(seed)
    if sources.trained:
        history = study.ledger.cells.get(sources.key, {}).get("history", [])
        _generators(result, history, sources.generators(), seed)
    _samples(result, study, sources)
    result.write(path)


def _generators(page: Page, history: list[dict[str, float]], generators: Generators, seed: int) -> None:
    steps = f", {history[-1]['step']} steps" if history else ""
    page.section("KegNet's generators", f"{len(generators)} generators{steps}.")
    terms = [name for name in history[0] if name not in ("step", "agreement")] if history else []

    def curves(axes: Any) -> None:
        for name in terms:
            axes.plot([entry["step"] for entry in history], [entry[name] for entry in history], label=name)
        axes.set(xlabel="step", yscale="log")
        axes.legend()

    if history:
        page.chart(curves, "Terms of the objective, mean over the generators.")
    if len(generators.sample_shape) == 3:
        draw = torch.Generator().manual_seed(seed)
        page.images(
            {"a row per label; generator by generator, a column per noise vector": grid(generators, draw)}
        )
        page.images({"from label 0 to label 5, a row per generator": walk(generators, draw)})


def _samples(page: Page, study: Study, sources: Sources) -> None:
    """How the teacher sees each source: confidence, class balance; how far apart the samples are."""
    page.section("Samples", f"The teacher's view of {SHOWN} samples of each source.")
    classes = study.info.num_classes
    shown, entries, counts, sure = {}, [], {}, {}
    for method in METHODS:
        if method == "tucker-only" or not sources.has(method) or not sources.made(method):
            continue
        samples = sources.draw(method, SHOWN)
        with torch.no_grad():
            probability = study.teacher(samples).softmax(1)
        sure[method] = probability.amax(1)
        counts[method] = probability.argmax(1).bincount(minlength=classes) / len(samples)
        share = counts[method].clamp(min=1e-12)
        entries.append([
            method,
            f"{sure[method].mean():.3f}",
            f"{(-(share * share.log()).sum()).exp():.1f} of {classes}",
            f"{torch.pdist(samples[:200].flatten(1)).mean():.1f}",
        ])  # fmt: skip
        shown[method] = samples[:32].unflatten(0, (4, 8))
    page.table(["source", "teacher's confidence", "classes in effect", "mean pairwise distance"], entries)

    def balance(axes: Any) -> None:
        for method, share in counts.items():
            axes.plot(range(classes), share, marker="o", label=method)
        axes.set(xlabel="class", ylabel="share of the samples", ylim=(0, None))
        axes.legend()

    def confidence(axes: Any) -> None:
        for method, values in sure.items():
            axes.plot(values.sort().values, torch.linspace(0, 1, len(values)), label=method)
        axes.set(xlabel="the teacher's confidence", ylabel="share of the samples up to it")
        axes.legend()

    page.chart(balance, "The classes that the teacher sees.")
    page.chart(confidence, "How sure the teacher is of the samples.")
    if len(study.info.sample_shape) == 3:
        page.images(shown)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
