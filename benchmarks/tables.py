"""Writes the tables of the README and the documents anew: python -m benchmarks.tables"""

import json
from collections.abc import Callable
from statistics import mean
from typing import Any

from benchmarks import bench_diversity, cuda_counts
from benchmarks.common import RESULTS, by_machine, caption, facts_of, markdown_table, update_tables
from kegfast._util.statistics import binomial_interval
from kegfast.experiments.boundary import COMPARED, MEASURES
from kegfast.experiments.demo import SOURCES, TITLES
from kegfast.experiments.lenets import TEACHERS


def demo(runs: list[dict[str, Any]]) -> str:
    """Accuracy by student and source: the mean over seeds, and the lowest and highest."""
    students = [run["students"] for run in runs]
    first = students[0]
    headers = ["", "teacher", *(f"{s['name']}, {s['ratio']:.1f}x" for s in first)]
    teachers = [run["teacher"] for run in runs]
    rows = [
        ["parameters", f"{teachers[0]['parameters']:,}", *(f"{s['parameters']:,}" for s in first)],
        ["latency, batch 64 (ms)", _spread([t["latency_ms"] for t in teachers])]
        + [_spread([s[i]["latency_ms"] for s in students]) for i in range(len(first))],
    ]
    for source in (name for name in SOURCES if name in first[0]["accuracy"]):
        own = _spread([t["accuracy"] for t in teachers]) if source == "tucker" else ""
        cells = [_spread([s[i]["accuracy"][source] for s in students]) for i in range(len(first))]
        rows.append([TITLES[source], own, *cells])
    return markdown_table(headers, rows)


def tucker2(summary: dict[str, dict[str, float]]) -> str:
    """Geometric means of rival / kegfast by batch size."""
    names = [
        "best rival",
        "best rival, ResNet shapes",
        "best rival, worst configuration",
        "NCHW Sequential",
        "dense layer",
        "weight gradients, share of peak",
        "two threads over one",
        "two threads over one, share of at least 1.8",
    ]
    rows = [
        [name, *(f"{figures[name]:.2f}" for figures in summary.values())]
        for name in names
        if all(name in figures for figures in summary.values())
    ]
    return markdown_table(["rival / kegfast", *(f"batch {batch}" for batch in summary)], rows)


def models(results: dict[str, Any]) -> str:
    """Whole networks: the dense network and its Sequential twin over kegfast's."""
    kinds = ["dense", "sequential", "folded dense", "folded sequential"]
    headers = ["dense", "Sequential", "folded: dense", "Sequential", "huge pages: dense", "Sequential"]
    rows = [
        [row["model"], row["threads"], row["batch"]]
        + [f"{row[kind]:.2f}" for kind in kinds]
        + [f"{huge[kind]:.2f}" for kind in kinds[:2]]
        for row, huge in zip(results["configurations"], results["huge_pages"], strict=True)
    ]
    return markdown_table(["model", "threads", "batch", *headers], rows)


def models_training(results: dict[str, Any]) -> str:
    """Training steps of whole networks, and how near ours come to the machine's limits."""
    headers = ["model", "threads", "batch", "dense", "Sequential", "huge pages: dense", "Sequential"]
    rows = [
        [row["model"], row["threads"], row["batch"]]
        + [f"{r[kind]:.2f}" for r in (row, huge) for kind in ("dense", "sequential")]
        + [f"{row[limit]:.0%}" for limit in ("share_of_peak", "share_of_bandwidth")]
        for row, huge in zip(results["configurations"], results["huge_pages"], strict=True)
    ]
    return markdown_table([*headers, "of the FMA peak", "of the bandwidth"], rows)


def models_compiled(results: dict[str, Any]) -> str:
    """Networks compiled with frozen weights over kegfast's with folded BatchNorms, uncompiled."""
    rows = [
        [row["model"], row["threads"], row["batch"]]
        + [f"{row[f'compiled {kind}']:.2f}" for kind in ("dense", "sequential")]
        for row in results["configurations"]
    ]
    return markdown_table(["model", "threads", "batch", "compiled dense", "compiled Sequential"], rows)


def frozen(results: dict[str, Any]) -> str:
    """Frozen networks against the better of ONNX Runtime and OpenVINO, with the goals."""
    headers = [
        "network",
        "layers",
        "threads",
        "batch",
        "kegfast (ms)",
        "ONNX Runtime",
        "OpenVINO",
        "best / kegfast",
    ]
    rows = [
        [row["model"], row["kind"], row["threads"], row["batch"]]
        + [f"{1e3 * row['seconds'][name]:.3f}" for name in ("kegfast", "onnxruntime", "openvino")]
        + [f"{row['ratio']:.2f}", row["goal"] or ""]
        for row in results["configurations"]
    ]
    return markdown_table([*headers, "goal"], rows)


def exact_comparison(results: dict[str, Any]) -> str:
    """Repeated calls with every byte of their factors compared, and with factors promised to be final."""
    batches = list(dict.fromkeys(row["batch"] for row in results["configurations"]))
    layers: dict[str, dict[int, dict[str, Any]]] = {}
    for row in results["configurations"]:
        layers.setdefault(row["layer"], {})[row["batch"]] = row
    rows = []
    for layer, of in layers.items():
        cells = [layer, f"{of[batches[0]]['bytes'] / 1024:,.0f}"]
        for batch in batches:
            final, exact = of[batch]["final"], of[batch]["exact"]
            cells += [f"{final:.1f}", f"{exact:.1f}", f"{exact / final - 1:+.0%}"]
        rows.append(cells)
    headers = [f"batch {batch}: {what}" for batch in batches for what in ("final (us)", "exact (us)", "more")]
    return markdown_table(["layer", "factors (KB)", *headers], rows)


def curve(cells: list[dict[str, Any]]) -> str:
    """Accuracy straight after compression, by parameter ratio and rule."""
    rules = list(dict.fromkeys(c["way"] for c in cells if c["ratio"] > 1))
    rules = [rule for rule in rules if not rule.startswith("evbmf")]
    ratios = sorted({round(c["ratio"], 1) for c in cells if c["way"] == rules[-1]})

    def column(ratio: float) -> float:  # rules that count layer by layer only come near the ratio asked for
        return min(ratios, key=lambda r: abs(r - ratio))

    found = {(c["way"], column(c["ratio"])): f"{c['accuracy']:.1f}" for c in cells}
    rows = [[rule, *(found.get((rule, ratio), "") for ratio in ratios)] for rule in rules]
    return markdown_table(["ranks by", *(f"{ratio:.1f}x" for ratio in ratios)], rows)


def speedups(cells: list[dict[str, Any]]) -> str:
    """Time of the original over that of its student, and the ratio of parameters that is left."""
    asked = sorted({cell["asked"] for cell in cells})
    found = {(c["model"], c["threads"], c["batch"], c["asked"]): c for c in cells}
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    rows = [
        [model, threads, batch]
        + [
            f"{c['speedup']:.2f} ({c['ratio']:.1f}x)"
            for c in (found[model, threads, batch, a] for a in asked)
        ]
        for model, threads, batch in sorted({key[:3] for key in found}, key=lambda k: (models.index(k[0]), k))
    ]
    return markdown_table(["model", "threads", "batch", *(f"{ratio:g}x" for ratio in asked)], rows)


def paper(rows: list[dict[str, Any]]) -> str:
    """A table of the paper, cell by cell: mean and standard deviation over seeds."""
    headers = ["student", "ranks", "method", "params", "ratio", "published", "ours", "best", "seeds"]
    cells = []
    for r in rows:
        published = f"{r['published']:.2f}" if r["published"] and r["ranks"] == "paper" else ""
        ours = f"{r['mean']:.2f}" + (f" ± {r['std']:.2f}" if len(r["accuracy"]) > 1 else "")
        cells.append(
            [f"S{r['student']}", r["ranks"], r["method"], f"{r['params']:,}", f"{r['ratio']:.2f}x", published,
             ours, f"{mean(r['oracle']):.2f}", len(r["accuracy"]), f"{r['seconds']:.0f}", f"{r['samples']:,}"]
        )  # fmt: skip
    return markdown_table([*headers, "CPU s", "samples"], cells)


def by_dataset(rows: list[dict[str, Any]]) -> str:
    """The same with several data sets in one table."""
    lines = [
        [r["dataset"], r["method"], f"{r['ratio']:.2f}x", f"{r['published']:.2f}" if r["published"] else "",
         f"{r['mean']:.2f}", f"{mean(r['oracle']):.2f}", f"{r['samples']:,}"]
        for r in rows
    ]  # fmt: skip
    return markdown_table(["data set", "method", "ratio", "published", "ours", "best", "samples"], lines)


def stand_in(rows: list[dict[str, Any]]) -> str:
    """The same on few images: accuracy and agreement with the teacher, each with its interval."""

    def counted(values: list[float], n: int) -> str:
        low, high = binomial_interval(mean(values), n)
        return f"{mean(values):.1f} ({low:.1f} to {high:.1f})"

    headers = ["student", "ranks", "method", "params", "ratio", "published", "ours", "agrees", "CPU s"]
    cells = []
    for r in rows:
        published = f"{r['published']:.2f}" if r["published"] and r["ranks"] == "paper" else ""
        n, agreement = r["tested"]["n"], r["tested"]["agreement"]
        cells.append(
            [f"S{r['student']}", r["ranks"], r["method"], f"{r['params']:,}", f"{r['ratio']:.2f}x", published,
             counted(r["accuracy"], n), counted(agreement, n), f"{r['seconds']:.0f}"]
        )  # fmt: skip
    return markdown_table(headers, cells)


def published(rows: list[dict[str, Any]]) -> str:
    """Accuracy of one student by steps, by what was not as published."""
    asked = (500, 1_000, 2_000, 4_000, 6_000, 10_000)  # not all of them end an epoch of every variant
    cells = []
    for r in rows:
        curve = dict(r["curve"])
        row = [r["variant"], *(f"{curve[at]:.2f}" if at in curve else "" for at in asked)]
        cells.append([*row, f"{max(curve.values()):.2f}", f"{r['accuracy']:.2f}"])
    steps = [f"{at:,} steps" for at in asked]
    return markdown_table(["taught", *steps, "best", "chosen without data"], cells)


def ablation(rows: list[dict[str, Any]]) -> str:
    """Accuracy of each variant: mean and standard deviation over seeds."""
    cells = [[r["variant"], f"{r['mean']:.2f} ± {r['std']:.2f}", r["n"]] for r in rows]
    return markdown_table(["taught with", "accuracy", "seeds"], cells)


def soft_target(rows: list[dict[str, Any]]) -> str:
    """Fused soft target against torch's operators."""
    cells = [
        [r["batch"], f"{r['classes']:,}", f"{r['torch / fused']:.1f}", f"{r['compiled'] / r['fused']:.1f}"]
        for r in rows
    ]
    return markdown_table(["batch", "classes", "torch / kegfast", "compiled / kegfast"], cells)


Found = dict[str, dict[str, float]]
"""What an experiment of distillation found: mean, std and n by name."""


def hinton(found: Found) -> str:
    """Test errors beside the paper's, then what was to hold."""
    names = {
        "teacher": 67,
        "student alone": 146,
        "distilled": 74,
        "distilled on moved images": "",
        "without 3: errors": 206,
        "without 3: errors after the shift": 109,
        "7 and 8 only: errors": 4730,
        "7 and 8 only: errors after the shift": 1320,
        "one network": "",
        "ensemble": "",
        "distilled from the ensemble": "",
    }
    errors = [[name, paper, _mean(found[name], 1), found[name]["n"]] for name, paper in names.items()]
    alone, teacher, one, ensemble = (
        found[name]["mean"] for name in ("student alone", "teacher", "one network", "ensemble")
    )
    goals = []
    for name in ("distilled", "distilled on moved images"):
        own = found[name]["mean"]
        goals.append(
            (f"{name}: percent of the errors alone, 60 at most", 100 * own / alone, own <= 0.6 * alone)
        )
        goals.append(
            (f"{name}: errors more than the teacher, 15 at most", own - teacher, own <= teacher + 15)
        )
    threes = found["without 3: percent right of the moved classes"]["mean"]
    goals.append(("without 3: percent of the 3s right, 95 at least", threes, threes >= 95))
    rest = found["7 and 8 only: errors after the shift"]["mean"] / 100
    goals.append(("7 and 8 only: percent of errors, below 20", rest, rest < 20))
    kept = 100 * (one - found["distilled from the ensemble"]["mean"]) / (one - ensemble)
    goals.append(("ensemble: percent of its gain kept by one student, 80 at least", kept, kept >= 80))
    return _tables(["errors of 10,000", "paper", "ours", "seeds"], errors, goals)


def boundary(found: Found) -> str:
    """Accuracies with little data, similarities of the boundaries, then what was to hold."""
    shares = list(dict.fromkeys(name.split(", ")[0] for name in found if name[0].isdigit()))
    losses = list(dict.fromkeys(name.split(", ")[1] for name in found if name[0].isdigit()))
    rows = [[loss, *(_mean(found[f"{share}, {loss}"], 2) for share in shares)] for loss in losses]
    goals = []
    for share in shares:
        alone = found[f"{share}, alone"]["mean"]
        for loss in losses[1:]:
            gain = found[f"{share}, {loss}"]["mean"] - alone
            goals.append((f"{share}, {loss}: points above the student alone", gain, gain > 0))
    return f"{_tables(['percent right', *shares], rows, goals)}\n\n{_boundaries(found)}"


def _boundaries(found: Found) -> str:
    """How alike the boundaries of students and teacher are, then what was to hold."""
    rows, goals = [], []
    for teacher in TEACHERS:
        rows.append([teacher, "the teacher", _mean(found[f"{teacher}, teacher: length"], 2), "", ""])
        for student in COMPARED:
            length, *alike = (found[f"{teacher}, {student}: {name}"] for name in ("length", *MEASURES))
            rows.append([teacher, student, _mean(length, 2), *(_mean(cell, 3) for cell in alike)])
        for measure in MEASURES:
            means = [found[f"{teacher}, {student}: {measure}"]["mean"] for student in COMPARED]
            name = f"{teacher}: {measure} rises from each student to the next; from first to last by"
            goals.append((name, means[-1] - means[0], means == sorted(set(means))))
        across = found[f"{teacher}, percent of the accepted across"]["mean"]
        goals.append((f"{teacher}: percent of the accepted across, 90 at least", across, across >= 90))
    return _tables(["teacher", "student", "length of the vectors", *MEASURES], rows, goals)


def _tables(headers: list[str], rows: list[list[Any]], goals: list[tuple[str, float, bool]]) -> str:
    """A table, and under it whether each goal holds."""
    rows = [row + [""] * (len(headers) - len(row)) for row in rows]
    verdicts = [[goal, f"{value:.3g}", "yes" if holds else "no"] for goal, value, holds in goals]
    return f"{markdown_table(headers, rows)}\n\n{markdown_table(['goal', 'ours', 'holds'], verdicts)}"


def training(results: dict[str, Any]) -> str:
    """Training steps of generators and students over those of their rivals, by number of threads."""
    generators, students = results["generators"], results["students"]
    threads = [row["threads"] for row in students]
    rows = []
    for copies in dict.fromkeys(row["copies"] for row in generators):
        own = [row for row in generators if row["copies"] == copies]
        name = f"generator step, {copies} at once, per generator: loss written out / kegfast"
        rows.append([name, *(f"{row['rival / kegfast']:.1f}" for row in own)])
    for key in (key for key in students[0] if key.startswith("kegfast / ")):
        rows.append([f"student steps a second: {key}", *(f"{row[key]:.2f}" for row in students)])
    return markdown_table(["", *(f"{n} threads" if n > 1 else "1 thread" for n in threads)], rows)


TABLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "demo": ("demo", "runs", demo),
    "diversity": ("diversity", "cases", bench_diversity.table),
    "tucker2": ("tucker2_float32_1threads_*", "summary", tucker2),
    "tucker2-2-threads": ("tucker2_float32_2threads_*", "summary", tucker2),
    "tucker2-training": ("tucker2_training_1threads_*", "summary", tucker2),
    "tucker2-bfloat16": ("tucker2_bfloat16_1threads_*", "summary", tucker2),
    "frozen": ("frozen_*", "", frozen),
    "models": ("models", "", models),
    "models-training": ("models_training", "", models_training),
    "models-compiled": ("models_compiled", "", models_compiled),
    "curve-mnist": ("compression_curve_mnist", "cells", curve),
    "curve-fashion": ("compression_curve_fashion", "cells", curve),
    "compression-latency": ("compression_latency", "cells", speedups),
    "mnist": ("reproduce_mnist", "rows", paper),
    "mnist-published": ("reproduce_mnist_published", "rows", paper),
    "published-mnist": ("published_mnist", "rows", published),
    "svhn": ("reproduce_svhn", "rows", stand_in),
    "tables-published": ("reproduce_tables_published", "rows", by_dataset),
    "ablation-mnist": ("ablation_mnist", "rows", ablation),
    "terms-mnist": ("terms_mnist", "rows", ablation),
    "fashion": ("reproduce_fashion", "rows", paper),
    "shuttle": ("reproduce_shuttle", "rows", paper),
    "pendigits": ("reproduce_pendigits", "rows", paper),
    "letter": ("reproduce_letter", "rows", paper),
    "exact comparison": ("tucker2_exact", "", exact_comparison),
    "soft_target": ("soft_target", "rows", soft_target),
    "training": ("training", "", training),
    "hinton": ("hinton", "results", hinton),
    "boundary": ("boundary", "results", boundary),
    "cuda counts of Tucker-2": ("cuda_counts", "tucker2", cuda_counts.tucker2_table),
    "cuda counts of diversity": ("cuda_counts", "diversity", cuda_counts.diversity_table),
}
"""Marker in a page -> results files, their key (empty for all of it), and what makes a table of each.

One table for each processor and instruction set: rows of two machines are never compared.
"""


def captioned(make: Callable[[Any], str], rows: Any, results: Any) -> str:
    """A table for each machine, and under it where and when it was measured."""
    parts = []
    for own, facts in by_machine(rows, facts_of(results)):
        line = caption(facts)
        parts.append(make(own) + (f"\n\n*{line}*" if line else ""))
    return "\n\n".join(parts)


def main() -> None:
    for name, (file, key, make) in TABLES.items():
        paths = sorted(RESULTS.glob(f"{file}.json"))
        if not paths:
            print(f"{file}.json is missing: the table '{name}' stays as it is")
            continue
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        tables = [  # of a run in pieces, there is no table before all are there
            captioned(make, results[key] if key else results, results)
            for results in found
            if not key or results[key]
        ]
        if not update_tables(name, "\n\n".join(tables)):
            raise ValueError(f"no page has a place '<!-- benchmark: {name} -->'")


def _mean(cell: dict[str, float], digits: int) -> str:
    text = f"{cell['mean']:.{digits}f}"
    return text if cell["n"] == 1 else f"{text} ± {cell['std']:.{digits}f}"


def _spread(values: list[float], digits: int = 1) -> str:
    text = f"{mean(values):.{digits}f}"
    low, high = min(values), max(values)
    return text if len(values) == 1 else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
