"""What benchmarks share: the machine's facts and limits, results, the tables made of them."""

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kegfast import build_info
from kegfast._util.files import atomic_write, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What a result depends on: processor, versions, threads, date."""
    model = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = build_info()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": model[1] if model else platform.processor(),
        "commit": commit.stdout.strip(),
        **{key: info.get(key) for key in ("version", "python", "torch", "compiler", "isa_active")},
    }


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def bandwidth(seconds: float = 0.3) -> float:
    """Bytes a second that torch's threads move (reads plus writes) in copies far larger than the caches."""
    source, target = torch.zeros(2, 64 << 20, dtype=torch.uint8)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(times)


def multiply_add_rate(dtype: torch.dtype = torch.float32) -> float:
    """Multiply-adds a second that one core does at most (independent ones, in registers).

    Of bfloat16 where the instruction set has them, else of float32.
    """
    from kegfast import _C

    return max(_C.multiply_add_rate(dtype == torch.bfloat16) for _ in range(20))


def vector_issue_rate() -> float:
    """Vector instructions a second that one core issues at most (independent 32-bit integer additions)."""
    from kegfast import _C

    return max(_C.vector_issue_rate() for _ in range(20))


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, each tensor once a call; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def write_results(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write <name>.json, by default in benchmarks/results, with the machine's facts."""
    path = folder / f"{name}.json"
    write_json(path, {"machine": machine(), **results})
    return path


def earlier_results(name: str) -> dict[str, Any]:
    """What benchmarks/results/<name>.json has from a machine like this one; nothing from any other."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    here, there = machine(), found.get("machine", {})
    alike = all(here[key] == there.get(key) for key in ("processor", "isa_active"))
    return found if alike else {}


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pages() -> list[Path]:
    """Where tables of results may stand: the README and the documents."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def update_tables(name: str, table: str) -> bool:
    """Puts a table between `<!-- benchmark: name -->` and `<!-- end -->`; False without such a place."""
    pattern = re.compile(rf"(<!-- benchmark: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    places = 0
    for page in pages():
        text, found = pattern.subn(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", page.read_text(encoding="utf-8"))
        places += found
        if found:
            with atomic_write(page) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return places > 0


def caption(results: Mapping[str, Any]) -> str:
    """One line under a table: where and when it was measured, as far as the file says."""
    facts = results.get("machine") or {}
    build = results.get("build") or {}
    known = {**build, **facts}
    date = str(known.get("date") or results.get("date") or "")[:10]
    torch_version = known.get("torch")
    parts = [
        date,
        known.get("processor"),
        known.get("isa_active"),
        f"torch {torch_version}" if torch_version else None,
    ]
    return ", ".join(str(part) for part in parts if part)
