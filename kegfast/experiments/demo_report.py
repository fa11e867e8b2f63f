"""report.html of a demo run, made from what its folder holds."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kegfast._util.extras import extra
from kegfast._util.files import read_state_dict
from kegfast._util.html import Page
from kegfast.experiments.demo import SOURCES, TITLES
from kegfast.training.loop import MetricsLog

with extra("report"):
    from matplotlib.axes import Axes

GENERATED, OTHERS = "shrink", 0.55
"""The source that stands out in the charts, and the opacity of the others."""


def write_demo_report(out: Path) -> Path:
    """Write report.html into a finished run folder of `run_demo`.

    Args:
        out: the folder with results.json, metrics.jsonl and images.safetensors.

    Returns:
        The path of report.html, one file that needs no other.
    """
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    images = read_state_dict(out / "images.safetensors")
    entries = MetricsLog(out / "metrics.jsonl").read()
    students, teacher = results["students"], results["teacher"]

    page = Page("kegfast demo", f"data set {results['dataset']}, seed {results['seed']}")
    page.section(
        "Accuracy on the real test set, percent",
        "Each student is cut from the teacher by Tucker-2 decomposition and then taught with samples from "
        "one source, all with the same schedule and number of samples; students of noise keep the teacher's "
        "BatchNorm statistics, which suits them better. kegfast.shrink spends the same number of parameters "
        "over all layers and makes its own samples. Only the last row sees real data.",
    )
    header, rows = demo_table(results)
    page.table(header, rows, best=[i for i, row in enumerate(rows) if row[0] == TITLES[GENERATED]])
    page.chart(lambda axes: _accuracy_against_size(axes, teacher, students), "Accuracy against size")
    page.section("What the generators made", "Rows share a label, columns share a noise vector.")
    page.images({f"generator {i}": grid for i, grid in enumerate(images["grid"], start=1)}, scale=1)
    page.section("Mean image of each class")
    means = {"generated": images["generated_mean"], "real": images["real_mean"]}
    page.images({name: mean[None] for name, mean in means.items()})
    page.section("Latency", "Median time of one call, the models taking turns in one run.")
    page.chart(lambda axes: _latency_bars(axes, teacher, students), "Lower is better", size=(7.2, 2.4))
    page.section("Loss curves")
    for title, stages in _curves(entries).items():
        page.chart(partial(_loss_curves, curves=stages), title)
    page.section("Seconds by stage")
    page.table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in results["seconds"].items()])
    path = out / "report.html"
    page.write(path)
    return path


def demo_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The results as a table: its header, and a row per model and property."""
    students = results["students"]
    teacher = results["teacher"]
    header = ["", "teacher", *(s["name"] for s in students)]
    rows = [
        ["parameters", f"{teacher['parameters']:,}", *(f"{s['parameters']:,}" for s in students)],
        ["ratio", "1.0x", *(f"{s['ratio']:.1f}x" for s in students)],
        ["latency (ms)", *(f"{m['latency_ms']:.1f}" for m in (teacher, *students))],
    ]
    for source in SOURCES:
        own = f"{teacher['accuracy']:.1f}" if source == "tucker" else ""
        rows.append([TITLES[source], own, *(f"{s['accuracy'][source]:.1f}" for s in students)])
    return header, rows


def _accuracy_against_size(
    axes: Axes, teacher: Mapping[str, Any], students: Sequence[Mapping[str, Any]]
) -> None:
    sizes = [student["parameters"] / 1e3 for student in students]
    for source in SOURCES:
        accuracy = [student["accuracy"][source] for student in students]
        stands_out = source == GENERATED
        axes.plot(
            sizes,
            accuracy,
            marker="o",
            label=TITLES[source],
            linewidth=2.5 if stands_out else 1.5,
            alpha=1.0 if stands_out else OTHERS,
        )
    axes.axhline(teacher["accuracy"], color="#222222", linestyle=":", label="teacher")
    axes.set(xlabel="parameters (thousands)", ylabel="accuracy (%)", ylim=(0, 103))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _latency_bars(axes: Axes, teacher: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> None:
    names = ["teacher", *(f"{student['name']} ({student['ratio']:.1f}x)" for student in students)]
    bars = axes.barh(names, [model["latency_ms"] for model in (teacher, *students)])
    axes.bar_label(bars, fmt="%.2f ms", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds")


def _curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Chart title -> curve -> (step, value); students show their loss alone, a curve per source."""
    charts: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in entries:
        stage, step = entry["stage"], entry["step"]
        own = stage in ("train", "extract")
        for name, value in entry.items():
            if name in ("stage", "step", "seconds", "lr") or (not own and name != "loss"):
                continue
            title = {"train": "Teacher", "extract": "Extraction"}.get(
                stage, f"Student {stage.split()[0]}, loss"
            )
            curve = name if own else TITLES.get(stage.split()[-1], stage)
            charts.setdefault(title, {}).setdefault(curve, []).append((step, value))
    return charts


def _loss_curves(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name)
    if min(value for points in curves.values() for _, value in points) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
