"""Entries of docstrings that stand for several arguments ("stride, padding: ..."), one by one for the tables.

Griffe looks for the type and the default of each name by itself.
"""

import re
from typing import Any

import griffe

_NAMES = r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): "
_TEXT = r"(?P<text>.*(?:\n(?P=indent) +\S.*)*)"  # to the end of its lines, which stand further in
_SEVERAL = re.compile(_NAMES + _TEXT, re.MULTILINE)


def split(text: str) -> str:
    """The docstring with an entry for each of the names."""

    def each(entry: re.Match[str]) -> str:
        return "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", "))

    return _SEVERAL.sub(each, text)


class SplitNames(griffe.Extension):
    """Applies `split` to everything that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)
