"""What holds of the tree itself: files stay short, and a module is not hidden by a function of its name."""

import importlib
import pkgutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import kegfast

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".cmake", ".txt"}
LONGEST = 400  # lines
WIDEST = 110  # columns, comments too, which no formatter breaks


def sources() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: which files belong to it is unknown")
    return [ROOT / name for name in done.stdout.splitlines() if Path(name).suffix in SUFFIXES]


def test_files_have_at_most_400_lines():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources()}
    assert not {str(path): n for path, n in lengths.items() if n > LONGEST}


def test_lines_have_at_most_110_columns():
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDEST and path.suffix in {".cpp", ".h", ".inl", ".cu", ".cuh"}
    ]
    assert not wide


def test_no_module_is_hidden_by_something_of_its_name():
    hidden = []
    for info in pkgutil.walk_packages(kegfast.__path__, "kegfast."):
        if info.name.rpartition(".")[2] in ("_C", "_cuda", "libkegfast_runtime", "__main__"):
            continue
        parent, _, leaf = info.name.rpartition(".")
        importlib.import_module(info.name)
        if not isinstance(getattr(importlib.import_module(parent), leaf), ModuleType):
            hidden.append(info.name)
    assert not hidden
