"""report.html: one self-contained file of tables, charts and image grids (inline SVG and PNG)."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from kegfast._util.extras import extra
from kegfast._util.files import atomic_write

with extra("report"):  # said before a run, not at its end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

# Okabe and Ito's palette: told apart by every kind of color vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#222222")

_STYLE = """
:root { color-scheme: light dark; --line: #d8dce2; --soft: #f4f6f8; --text: #1c2430; --dim: #5c6672;
  --mark: #0072B2 }
@media (prefers-color-scheme: dark) { :root { --line: #3a424d; --soft: #1e242c; --text: #e4e8ee;
  --dim: #9aa5b1;
  --mark: #56B4E9 } body { background: #14181d } figure svg, figure img { background: #fff;
  border-radius: 6px } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); max-width: 60rem; margin: 2.5rem auto;
  padding: 0 1.2rem }
h1 { font-size: 1.9rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem }
  .dim, figcaption { color: var(--dim) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { background: var(--soft); font-weight: 600 }
td.best { font-weight: 700; color: var(--mark) } .scroll { overflow-x: auto }
figure { margin: 1rem 0 } figure svg, figure img { max-width: 100%; height: auto }
  figcaption { font-size: .9rem }
.pixels { image-rendering: pixelated } .row { display: flex; flex-wrap: wrap; gap: 1.2rem }
  .row figure { margin: .4rem 0 }
"""


class Page:
    """Collects the parts of a report in order and writes them as one HTML file.

    Args:
        title: the page's heading.
        subtitle: a line under it, such as the command that made the run.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="dim">{html.escape(subtitle)}</p>']

    def section(self, title: str, text: str = "") -> None:
        """Open a section: a heading and an optional paragraph of plain text."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[object]], best: Sequence[int] = ()
    ) -> None:
        """Add a table.

        Args:
            headers: one name a column.
            rows: cells, written by `str`; the first column is left-aligned.
            best: indices of rows whose cells stand out.
        """
        head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
        body = ""
        for index, row in enumerate(rows):
            mark = ' class="best"' if index in best else ""
            body += "<tr>" + "".join(f"<td{mark}>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def chart(
        self, draw: Callable[[Axes], None], caption: str, size: tuple[float, float] = (7.2, 3.6)
    ) -> None:
        """Add a chart as inline SVG.

        Args:
            draw: puts the data on the axes that it is given.
            caption: plain text under the chart.
            size: width and height in inches.
        """
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=COLORS)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        self._parts.append(_figure(svg[svg.index("<svg") :], caption))

    def images(self, grids: Mapping[str, Tensor], scale: int = 2) -> None:
        """Add image grids side by side, each under its name.

        Args:
            grids: name -> (rows, columns, C, H, W), any range; each grid is stretched to its own range.
            scale: screen pixels per image pixel.
        """
        figures = []
        for name, grid in grids.items():
            pixels = tiled(grid)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, format="PNG")
            data = base64.b64encode(content.getvalue()).decode()
            figures.append(
                _figure(
                    f'<img class="pixels" alt="{html.escape(name)}" width="{pixels.shape[1] * scale}" '
                    f'src="data:image/png;base64,{data}">',
                    name,
                )
            )
        self._parts.append(f'<div class="row">{"".join(figures)}</div>')

    def write(self, path: Path) -> None:
        """Write the page atomically."""
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style>{''.join(self._parts)}</html>\n"
        )
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="utf-8")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def tiled(grid: Tensor) -> np.ndarray:  # (rows, columns, C, H, W) -> (rows * (H + 1) - 1, ..., 3) uint8
    low, high = grid.amin().item(), grid.amax().item()
    unit = (grid.float() - low) / max(high - low, 1e-12)
    unit = unit.expand(-1, -1, 3, -1, -1) if grid.shape[2] == 1 else unit[:, :, :3]
    padded = np.pad(unit.cpu().numpy(), ((0, 0), (0, 0), (0, 0), (0, 1), (0, 1)), constant_values=1.0)
    rows, columns, channels, height, width = padded.shape
    image = padded.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return (image[:-1, :-1] * 255).round().astype(np.uint8)
