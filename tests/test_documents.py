"""What README and documents show is true: code runs, commands parse, links lead somewhere."""

import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import kegfast
from kegfast.cli.app import make_parser
from kegfast.models import LeNet5
from kegfast.recovery import pace, teaching
from kegfast.recovery.samples import Amounts

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}
README = TEXTS["README.md"]
GUIDES = [name for name in PAGES if name.startswith("docs/guides") and "```python" in TEXTS[name]]


def code_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> list[str]:
    indented = re.findall(r"^    (kegfast (?:.*\\\n)*.*)", text, re.MULTILINE)
    return [*indented, *re.findall(r"`(kegfast [^`]+)`", text)]


COMMANDS = sorted({c for text in TEXTS.values() for c in commands_of(text) if "..." not in c})


def test_a_model_that_one_already_has(tmp_path, monkeypatch):
    """The example as it stands, with fewer samples and steps inside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "amounts", lambda subject: Amounts(256, 0, 64, 64))
    monkeypatch.setattr(teaching, "STRUCTURED", replace(teaching.STRUCTURED, steps=5))
    names = {"model": LeNet5()}
    exec(code_of(README)[0], names)
    assert names["report"].ratio >= 4
    assert 0 <= names["report"].predicted.agreement <= 100
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert kegfast.load(tmp_path / "student.safetensors")(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_one_layer_and_the_loss_alone():
    names = {"conv": nn.Conv2d(32, 32, 3), "noises": torch.randn(8, 10), "samples": torch.randn(8, 3, 4, 4)}
    exec(code_of(README)[1], names | {"kegfast": kegfast}, names)
    assert names["layer"].core.weight.shape == (16, 16, 3, 3)
    assert 0 < names["loss"].item() < 1


@pytest.mark.parametrize("name", GUIDES)
def test_guides_run_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": name}
    for code in code_of(TEXTS[name]):
        if "kegfast.freeze" in code and not kegfast.build_info()["native"]:
            pytest.skip("kegfast's compiled part is not built")
        exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_they_show(command):
    words = shlex.split(command.replace("\\\n", " "))[1:]
    args = make_parser().parse_args(words)
    assert args.command == words[0]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXTS[name])
    for link in filter(None, (a or b for a, b in links)):
        if re.match(r"https?:|mailto:|#", link):
            continue
        target, _, anchor = link.partition("#")
        path = (PAGES[name].parent / target).resolve()
        assert path.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", h.lower()).strip("-") for h in headings}, (
                f"{name}: {link}"
            )


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "examples").glob("*.py"))])
def test_examples_run(name):
    names = runpy.run_path(str(ROOT / "examples" / name))
    options = {"steps": 20} if "steps" in names["main"].__code__.co_varnames else {}
    result = names["main"](**options)
    assert all(value > 0 for value in (result if isinstance(result, tuple) else (result,)))


def test_entries_of_several_arguments_are_split_for_the_tables():
    pytest.importorskip("griffe")
    split = runpy.run_path(str(ROOT / "docs/split_names.py"))["split"]
    text = "X.\n\n    Args:\n        a, **b: of both\n            and more.\n        c: it, that: is.\n"
    both = "of both\n            and more.\n"
    assert split(text) == f"X.\n\n    Args:\n        a: {both}        **b: {both}        c: it, that: is.\n"
