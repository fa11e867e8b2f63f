"""What benchmarks share: the machine's facts and limits, results, the tables made of them."""

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kegfast import build_info
from kegfast._util.files import atomic_write, write_json
from kegfast._util.machine import measured, part_of_a_file_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What a result depends on: processor, versions, threads, date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = build_info()
    hidden = os.environ.get("HIDDEN_FROM_ALL")  # by avx2_only.c
    return {
        **measured(),
        "commit": commit.stdout.strip(),
        **{key: info.get(key) for key in ("version", "python", "torch", "compiler")},
        **({"hidden_from_all": hidden} if hidden else {}),
    }


def machine_name() -> str:
    """Of the processor and its instruction set, as results files are named that must not mix machines."""
    facts = machine()
    name = part_of_a_file_name(str(facts["processor"]))
    return f"{name}_{facts['isa_active']}" + ("_for_all" if "hidden_from_all" in facts else "")


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


def by_machine(rows: Any, facts: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Rows, a list or a dict, by the processor and the instruction set that they were measured with.

    Args:
        rows: each a dict, with `kegfast._util.machine.measured` under "measured" where it says so.
        facts: of the file, for rows that say nothing.

    Returns:
        For each machine its rows, as a list or a dict, and the facts with the machine's and the days put in.
    """
    items = list(rows.items()) if isinstance(rows, dict) else list(enumerate(rows))
    if not all(isinstance(row, dict) for _, row in items):
        return [(rows, dict(facts))]
    groups: dict[tuple[Any, Any], list[tuple[Any, Any]]] = {}
    for key, row in items:
        stamp = {**facts, **row.get("measured", {})}
        groups.setdefault((stamp.get("processor"), stamp.get("isa_active")), []).append((key, row))
    found = []
    for (name, isa), group in groups.items():
        days = sorted({str({**facts, **row.get("measured", {})}.get("date", "")) for _, row in group})
        period = " to ".join(dict.fromkeys((days[0], days[-1])))
        own = {**facts, "processor": name, "isa_active": isa, "date": period}
        part = dict(group) if isinstance(rows, dict) else [row for _, row in group]
        found.append((part, own))
    return found


def facts_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of a results file: its date, build and machine, as far as it says."""
    date = {"date": results["date"][:10]} if "date" in results else {}
    return {**date, **(results.get("build") or {}), **(results.get("machine") or {})}


def caption(known: Mapping[str, Any]) -> str:
    """One line under a table: where and when it was measured, as far as the facts say."""
    date = str(known.get("date") or "")
    torch_version = known.get("torch")
    parts = [
        date,
        known.get("processor"),
        f"{known.get('isa_active')} for all" if "hidden_from_all" in known else known.get("isa_active"),
        f"torch {torch_version}" if torch_version else None,
    ]
    return ", ".join(str(part) for part in parts if part)
