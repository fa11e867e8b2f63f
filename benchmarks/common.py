"""What benchmarks share: the machine's facts and limits, results, README tables."""

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


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json with the machine's facts."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), **results})
    return path


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def update_readme(name: str, table: str, path: Path = ROOT / "README.md") -> bool:
    """Put a table between `<!-- benchmark: name -->` and `<!-- end -->`; False without such a place."""
    pattern = re.compile(rf"(<!-- benchmark: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, found = pattern.subn(lambda m: f"{m[1]}{table}\n{m[2]}", path.read_text(encoding="utf-8"))
    if found:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return bool(found)
