"""The page builder: one well-formed file that needs no other, whatever text it is given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from kegfast._util.html import Page


class Outline(HTMLParser):
    """Collects tags, text and references; void elements close themselves."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    page = Page("title <b>", "sub & title")
    page.section("numbers", "text with <tags>")
    page.table(["name", "value"], [["a<b", 1], ["c", 2.5]], best=[1])
    page.chart(lambda axes: axes.plot([1, 2, 3], label="curve"), "caption")
    page.images({"grid": torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 1, 4, 5)})
    path = tmp_path / "folder" / "report.html"
    page.write(path)
    return path


def test_page_is_well_formed_and_needs_no_other_file(page):
    outline = Outline()
    outline.feed(page.read_text())
    assert outline.open == []
    assert {"table", "svg", "img", "h2"} <= set(outline.tags)
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    for text in ("title <b>", "sub & title", "text with <tags>", "a<b", "2.5", "caption"):
        assert text in outline.text
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_only_the_best_row_stands_out(page):
    assert re.findall(r'<td class="best">([^<]*)', page.read_text()) == ["c", "2.5"]


def test_images_are_tiled_in_order_and_stretched_to_their_range(page):
    data = re.search(r"data:image/png;base64,([^\"]+)", page.read_text())[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (2 * 4 + 1, 3 * 5 + 2, 3)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[-1, -1].tolist() == [255, 255, 255]
    assert (pixels[4] == 255).all()  # the line between the rows
    assert (pixels[:, 5] == 255).all()
    second = pixels[:4, 6:11, 0]  # row 0, column 1 holds 20..39 of 0..119
    np.testing.assert_allclose(second, (np.arange(20, 40).reshape(4, 5) / 119 * 255).round(), atol=1)


def test_constant_images_do_not_divide_by_zero(tmp_path):
    page = Page("flat")
    page.images({"flat": torch.full((1, 1, 3, 2, 2), 7.0)})
    page.write(tmp_path / "report.html")
    assert "data:image/png" in (tmp_path / "report.html").read_text()
