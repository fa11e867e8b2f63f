"""Draws the README's chart, for light and dark pages: python -m benchmarks.chart

Left, accuracy without data: the paper's LeNet5 student 3, three ways. Right, how many times as fast: the
diversity loss as torch.cdist, Tucker-2 layers as the best of their rivals, a folded ResNet-18.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, ROOT
from kegfast._util.files import atomic_write

ASSETS = ROOT / "docs" / "assets"


class Theme(NamedTuple):
    """Colors of a page."""

    name: str
    text: str
    ours: str
    theirs: str


THEMES = (Theme("light", "#1f2328", "#0969da", "#afb8c1"), Theme("dark", "#e6edf3", "#58a6ff", "#484f58"))


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def accuracies() -> list[tuple[str, float, bool]]:
    """(label, percent right, whether it is ours) of the paper's student 3."""
    rows = {(r["ranks"], r["method"]): r for r in read("reproduce_mnist")["rows"] if r["student"] == 3}
    kegnet, ours = rows["paper", "kegnet"], rows["budget", "kegfast"]
    return [
        (f"compressed {kegnet['ratio']:.1f}x, untaught", rows["paper", "tucker-only"]["mean"], False),
        ("KegNet, as published", kegnet["published"], False),
        (f"kegfast, {ours['ratio']:.1f}x", ours["mean"], True),
    ]


def speedups() -> list[tuple[str, float, bool]]:
    """(label, rival's time over ours, True)."""
    diversity = read("diversity")["cases"]["l1-1024x3072"]["ratios"]["cdist"]
    layers = read("tucker2_float32_1threads_amd-epyc_avx512_bf16")["summary"]["1"]["best rival"]
    networks = {(r["model"], r["threads"], r["batch"]): r for r in read("models")["configurations"]}
    network = networks["ResNet-18", 1, 1]["folded dense"]
    return [
        ("Tucker-2 layers, as torch at its best", layers, True),
        ("ResNet-18, as torch's dense one", network, True),
        ("diversity loss, as torch.cdist", diversity, True),
    ]


def bars(axes: Axes, rows: list[tuple[str, float, bool]], theme: Theme, unit: str) -> None:
    """Horizontal bars with their values behind them."""
    names, values, ours = zip(*rows, strict=True)
    colors = [theme.ours if own else theme.theirs for own in ours]
    drawn = axes.barh(range(len(rows)), values, color=colors, height=0.6)
    axes.bar_label(drawn, [f"{v:.1f}{unit}" for v in values], padding=4, color=theme.text)
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(colors=theme.text, length=0)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    axes.spines[:].set_visible(False)


def draw(theme: Theme) -> Path:
    """Writes one theme's SVG."""
    figure = Figure(figsize=(11, 2.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars(left, accuracies(), theme, " %")
    left.set_title("LeNet5 on MNIST, made small without data", color=theme.text, fontsize=11)
    left.set_xlim(0, 115)
    right.set_xscale("log")
    bars(right, speedups(), theme, "x")
    right.set_title("times as fast, CPU, one thread", color=theme.text, fontsize=11)
    right.set_xlim(1, 4000)
    path = ASSETS / f"results-{theme.name}.svg"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for theme in THEMES:
        print(draw(theme))
