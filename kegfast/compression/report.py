"""What compression did to each layer, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kegfast.decomposition.factors import Side

if TYPE_CHECKING:  # of extras
    from matplotlib.axes import Axes
    from rich.table import Table

    from kegfast._util.html import Page

Rank = tuple[Side, Side]


@dataclass
class LayerReport:
    """One layer: what it was, what it became, and the reason.

    Attributes:
        name: its name in the model; further names of a shared layer follow in `aliases`.
        kind: "Conv2d", "Linear" or the class that was left alone.
        shape: of its weight.
        decision: "tucker" (fused Tucker-2), "factors" (plain layers of the factors) or "dense".
        reason: why, in a few words.
        rank: (in_rank, out_rank) in use, None for a layer that stayed dense.
        rank_before_rounding: the ranks that the rule gave.
        parameters, parameters_before: of the layer, weight and bias.
        flops, flops_before: multiplications and additions of one forward pass on `example_input`.
        error: ||W - W'|| / ||W||, recomputed from the factors as stored.
        latency: median seconds of "dense", "unfused" and "fused", where they were measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    decision: str = "dense"
    reason: str = ""
    rank: Rank | None = None
    rank_before_rounding: Rank | None = None
    parameters: int = 0
    parameters_before: int = 0
    flops: int | None = None
    flops_before: int | None = None
    error: float = 0.0
    latency: dict[str, float] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)


@dataclass
class CompressionReport:
    """All layers and the totals of the whole model.

    Attributes:
        layers: one entry per convolution and Linear of the model, also for those left alone.
        parameters, parameters_before: of the whole model.
        flops, flops_before: of the layers above, None without `example_input`.
        latency: median seconds of the whole model, "before" and "after", where measured.
        plans: how much the outputs change by each way to spend the budget: the squared error as a share
            of their variance, plus a classifier's share of other answers; empty where none was tried.
        notes: what was done to the model as a whole.
    """

    layers: list[LayerReport] = field(default_factory=list)
    parameters: int = 0
    parameters_before: int = 0
    flops: int | None = None
    flops_before: int | None = None
    latency: dict[str, float] = field(default_factory=dict)
    plans: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times fewer parameters the whole model has."""
        return self.parameters_before / self.parameters if self.parameters else 1.0

    @property
    def ranks(self) -> dict[str, Rank]:
        """The ranks of every layer that is factored, by its name."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def __getitem__(self, name: str) -> LayerReport:
        """The entry of one layer, by any of its names."""
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        plain = asdict(self)
        plain["ratio"] = self.ratio
        for layer in plain["layers"]:
            for key in ("shape", "rank", "rank_before_rounding"):
                layer[key] = None if layer[key] is None else list(layer[key])
        return plain

    def to_markdown(self) -> str:
        """A table for a README or an issue, then the totals."""
        rows = [HEADINGS, ["---"] * len(HEADINGS), *self._rows()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", *self._totals()]) + "\n"

    def add_to(self, page: "Page") -> None:
        """A section of a report.html: the totals, bars of every layer before and after, the table."""
        page.section("Compression", "; ".join(self._totals()))
        names = [layer.name or "(model)" for layer in self.layers]
        height = 1.2 + 0.3 * len(names)
        bars = {
            "parameters": ([e.parameters_before for e in self.layers], [e.parameters for e in self.layers])
        }
        if self.flops_before:
            flops = ([e.flops_before or 0 for e in self.layers], [e.flops or 0 for e in self.layers])
            bars["FLOPs of one forward pass"] = flops
        for what, (before, after) in bars.items():
            draw = partial(_pairs_of_bars, names, before, after)
            page.chart(draw, f"{what} of each layer", size=(7.2, height))
        ranked = [layer for layer in self.layers if layer.rank is not None]
        if ranked:
            errors = partial(_bars, [e.name or "(model)" for e in ranked], [e.error for e in ranked])
            caption = "||W - W'|| / ||W|| of each factored layer"
            page.chart(errors, caption, size=(7.2, 1.2 + 0.3 * len(ranked)))
        page.table(HEADINGS, list(self._rows()))

    def __rich__(self) -> "Table":
        from rich.table import Table  # rich itself asks

        table = Table(title="; ".join(self._totals()), title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading in NUMBERS else "left")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[list[str]]:
        for layer in self.layers:
            ways = (layer.latency.get(way) for way in ("dense", "unfused", "fused"))
            yield [
                layer.name or "(model)",
                layer.kind,
                "x".join(map(str, layer.shape)),
                _rank(layer.rank, layer.rank_before_rounding),
                _change(layer.parameters_before, layer.parameters),
                _change(layer.flops_before, layer.flops),
                f"{layer.error:.4f}" if layer.rank else "",
                " / ".join("-" if s is None else f"{1e6 * s:.0f}" for s in ways) if layer.latency else "",
                f"{layer.decision}: {layer.reason}" if layer.reason else layer.decision,
            ]

    def _totals(self) -> list[str]:
        totals = [f"{self.parameters_before:,} -> {self.parameters:,} parameters ({self.ratio:.2f}x)"]
        if self.flops and self.flops_before:
            totals.append(
                f"{self.flops_before:,} -> {self.flops:,} FLOPs ({self.flops_before / self.flops:.2f}x)"
            )
        if self.latency:
            before, after = self.latency["before"], self.latency["after"]
            totals.append(f"{1e3 * before:.3f} -> {1e3 * after:.3f} ms ({before / after:.2f}x)")
        return totals + self.notes


HEADINGS = [
    "layer",
    "type",
    "weight",
    "rank in/out",
    "parameters",
    "FLOPs",
    "error",
    "us dense/unfused/fused",
    "decision",
]
NUMBERS = {"parameters", "FLOPs", "error"}


def _pairs_of_bars(names: Sequence[str], before: Sequence[int], after: Sequence[int], axes: "Axes") -> None:
    places = range(len(names))
    axes.barh([p - 0.2 for p in places], before, height=0.36, label="before")
    axes.barh([p + 0.2 for p in places], after, height=0.36, label="after")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncol=2, loc="lower left", bbox_to_anchor=(0, 1))


def _bars(names: Sequence[str], values: Sequence[float], axes: "Axes") -> None:
    axes.barh(range(len(names)), values, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def _rank(rank: Rank | None, before: Rank | None) -> str:
    def text(pair: Rank) -> str:
        return "/".join("-" if side is None else str(side) for side in pair)

    if rank is None:
        return ""
    return text(rank) if before in (None, rank) else f"{text(before)} -> {text(rank)}"


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
