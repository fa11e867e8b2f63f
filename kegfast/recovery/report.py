"""What `shrink` did and why, what came of it, and the page that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kegfast._util.timing import interleaved
from kegfast.compression.report import CompressionReport
from kegfast.recovery.judge import Verdict
from kegfast.recovery.prediction import Prediction
from kegfast.recovery.subject import Subject

if TYPE_CHECKING:  # matplotlib is slow to import, and most who shrink draw nothing
    from matplotlib.axes import Axes

ROUNDS = 5
"""Turns in which latencies are timed."""
SHOWN = 6, 12
"""Rows and columns of images on the page."""


@dataclass(frozen=True)
class Candidate:
    """A student that was judged.

    Attributes:
        name: what was done to it.
        divergence: from the teacher on held-out samples; the least is the best.
        verdicts: by the kind of the samples.
    """

    name: str
    divergence: float
    verdicts: Mapping[str, Verdict]


@dataclass
class ShrinkReport:
    """What `kegfast.shrink` did.

    Attributes:
        compression: every layer's ranks, parameters and errors.
        decisions: what was decided, and why.
        candidates: the students that were judged, in the order of their making.
        chosen: the one that was returned.
        before: the best before teaching.
        predicted: agreement with the teacher on real data; None where that cannot be known.
        latency: median seconds of a batch through "model" and "student", and its size.
        curve: other ratios of parameters, and what is predicted of their students before teaching.
        seconds: by stage.
        images: some of the samples made, (rows, columns, C, H, W); None where they are no images.
    """

    compression: CompressionReport = field(default_factory=CompressionReport)
    decisions: dict[str, str] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Candidate | None = None
    before: Candidate | None = None
    predicted: Prediction | None = None
    latency: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[float, Prediction]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    images: Tensor | None = None

    @property
    def ratio(self) -> float:
        """How many times fewer parameters the student has."""
        return self.compression.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {
            "ratio": self.ratio,
            "predicted": None if self.predicted is None else asdict(self.predicted),
            "decisions": self.decisions,
            "chosen": None if self.chosen is None else self.chosen.name,
            "before": None if self.before is None else self.before.name,
            "candidates": [
                {
                    "name": one.name,
                    "divergence": one.divergence,
                    "verdicts": {kind: verdict._asdict() for kind, verdict in one.verdicts.items()},
                }
                for one in self.candidates
            ],
            "latency": self.latency,
            "curve": [{"ratio": ratio, **asdict(predicted)} for ratio, predicted in self.curve],
            "seconds": self.seconds,
            "compression": self.compression.to_dict(),
        }

    def to_markdown(self) -> str:
        """The decisions, the students and the layers as tables."""
        parts = [*self._totals(), ""]
        parts += [f"- {name}: {why}" for name, why in self.decisions.items()]
        parts += ["", *_markdown(HEADINGS, self._rows()), "", self.compression.to_markdown()]
        return "\n".join(parts)

    def write(self, path: str | Path) -> None:
        """Writes the page, one HTML file."""
        from kegfast._util.html import Page

        page = Page("kegfast shrink", "; ".join(self._totals()))
        page.section("Decisions")
        page.table(["", "decided"], list(self.decisions.items()))
        page.section(
            "Before and after",
            "Students by what was done to them: how far their answers to held-out samples are from the "
            "network's, and how often both see the same class. The marked one was kept.",
        )
        names = [one.name for one in self.candidates]
        kept = [] if self.chosen is None else [names.index(self.chosen.name)]
        page.table(HEADINGS, self._rows(), best=kept)
        if self.curve:
            page.section(
                "Ratio against agreement",
                "Agreement with the network on real data, predicted: bars hold nine in ten cases. Students "
                "of other ratios are those straight after compression.",
            )
            page.chart(partial(_draw_curve, self), "Percent of real samples put into the network's class")
        if self.images is not None:
            page.section("Samples", self.decisions.get("samples", ""))
            page.images({"made by nothing but the network and chance": self.images}, scale=2)
        self.compression.add_to(page)
        page.section("Seconds by stage")
        page.table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in self.seconds.items()])
        page.write(Path(path))

    def _totals(self) -> list[str]:
        compression = self.compression
        totals = [
            f"{compression.parameters_before:,} -> {compression.parameters:,} parameters ({self.ratio:.2f}x)"
        ]
        known = self.predicted
        totals.append(
            f"agreement with the network on real data: {known}"
            if known
            else "agreement on real data: unknown"
        )
        if self.latency:
            before, after = self.latency["model"], self.latency["student"]
            batch = f"{self.latency['batch']:g} samples"
            totals.append(f"{batch}: {1e3 * before:.2f} -> {1e3 * after:.2f} ms ({before / after:.2f}x)")
        return totals

    def _rows(self) -> list[list[str]]:
        return [
            [
                one.name,
                f"{one.divergence:.4f}",
                ", ".join(f"{verdict.agreement:.1f} % ({kind})" for kind, verdict in one.verdicts.items()),
                "kept" if one is self.chosen else "",
            ]
            for one in self.candidates
        ]


HEADINGS = ["student", "divergence", "agreement on held-out samples", ""]


def latencies(subject: Subject, student: nn.Module) -> dict[str, float]:
    """Median seconds of a batch, the models taking turns."""
    batch = max(1, min(64, (1 << 18) // subject.numbers))
    like = next(subject.model.parameters())
    x = torch.zeros(batch, *subject.sample_shape).to(like)
    calls = {"model": partial(subject.model, x), "student": partial(student, x)}
    with torch.inference_mode():
        interleaved(calls, rounds=2)  # the first calls choose kernels and pack weights
        return {**interleaved(calls, rounds=ROUNDS), "batch": float(batch)}


def grid(samples: Tensor) -> Tensor | None:  # (n, C, H, W) -> (rows, columns, C, H, W)
    """As many images as fill the page's rows."""
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        return None
    columns = min(SHOWN[1], len(samples))
    rows = min(SHOWN[0], len(samples) // columns)
    return samples[: rows * columns].reshape(rows, columns, *samples.shape[1:]).cpu()


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


def _draw_curve(report: ShrinkReport, axes: "Axes") -> None:
    points = sorted(report.curve, key=lambda point: point[0])
    _bars(axes, points, "straight after compression")
    if report.predicted is not None:
        _bars(axes, [(report.ratio, report.predicted)], "this student", marker="D")
    axes.set(xlabel="times fewer parameters", ylabel="percent")
    axes.set_xscale("log")
    ratios = [ratio for ratio, _ in points] + [report.ratio]
    axes.set_xticks(ratios, [f"{ratio:.1f}" for ratio in ratios])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _bars(axes: "Axes", points: Sequence[tuple[float, Prediction]], label: str, marker: str = "o") -> None:
    ratios = [ratio for ratio, _ in points]
    middle = [predicted.agreement for _, predicted in points]
    below = [predicted.agreement - predicted.low for _, predicted in points]
    above = [predicted.high - predicted.agreement for _, predicted in points]
    axes.errorbar(ratios, middle, yerr=[below, above], marker=marker, capsize=3, label=label)
