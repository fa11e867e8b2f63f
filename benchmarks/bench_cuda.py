"""The operators on a CUDA device against everything a user could run instead.

`python -m benchmarks.bench_cuda --seconds 240` measures the cells in the order of their importance, stops in
time and says what it left out. It prints the goals with "pass" or "falls short", writes
benchmarks/results/cuda-<device>.json, and the fastest forms to the packaged cuda_table.json.

Every contender is verified before it is timed. Times are medians of interleaved rounds, by events: calls one
by one ("eager") and as a CUDA graph, over inputs that together are larger than the L2 cache.
"""

import argparse
import contextlib
import functools
import itertools
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cuda_cells as cells
from benchmarks.common import RESULTS, write_results
from benchmarks.tucker2_shapes import shapes
from kegfast import build_info
from kegfast._util.files import write_json
from kegfast.dispatch import cuda

DIVERSITY_GOALS_MS = {256: 0.020, 1024: 0.090, 4096: 0.5, 16384: 2.5}
CDIST_GOALS = {256: 40, 1024: 100}
CUDNN = ("cudnn", "cudnn channels_last")


class Job(NamedTuple):
    kind: str
    name: str
    seconds: float  # expected, until one of the kind has run
    run: Callable[[], cells.Row]


def jobs() -> list[Job]:
    """Every cell, the most important first."""
    bf16, part = torch.bfloat16, functools.partial
    resnet = [s for s in shapes() if s.family == "resnet" and s.stride == 1]
    goal = [s for s in resnet if s.channels // s.ranks[0] in (4, 8)]
    others = [s for s in shapes() if s not in goal]
    found = [
        Job("diversity", f"diversity {b}", 8, part(cells.diversity, b, rivals))
        for b, rivals in ((256, ("eager", "cdist")), (1024, ("cdist",)), (4096, ()), (16384, ()))
    ]
    found.append(Job("step", "generator step", 5, cells.generator_step))
    found += [
        Job("tucker2", f"{s.name} x{n}", 5, part(cells.tucker2, s, n, bf16))
        for n, s in itertools.product((128, 1), goal)
    ]
    found += [
        Job("soft_target", f"soft target {b} x {c}", 3, part(cells.soft_target, b, c))
        for b, c in ((256, 1000), (256, 10), (256, 100_000))
    ]
    found += [
        Job("training", f"{s.name} training", 6, part(cells.tucker2_training, s, 64, bf16)) for s in goal
    ]
    found += [
        Job("metric", f"diversity {m} 1024", 5, part(cells.other_diversity, m, 1024))
        for m in ("sqeuclidean", "cosine")
    ]
    found += [
        Job("compile", "diversity 256, torch.compile", 60, part(cells.diversity, 256, ("torch.compile",))),
        Job("compile", f"{goal[0].name} torch.compile", 60, part(cells.tucker2, goal[0], 128, bf16, True)),
    ]
    found += [
        Job("tucker2", f"{s.name} x{n}", 5, part(cells.tucker2, s, n, bf16))
        for s, n in itertools.product(others, (128, 1))
    ]
    found += [Job("tucker2", f"{s.name} float32", 5, part(cells.tucker2, s, 32, torch.float32)) for s in goal]
    return found


def emulated_jobs() -> list[Job]:
    """What shows without a device that a run reaches its end: one cell of each outcome."""

    def wrong() -> cells.Row:
        cells.verified({"kegfast": 1.0}, 0.5)
        raise AssertionError

    return [
        Job("soft_target", "soft target 3 x 10, emulated", 1, cells.emulated_soft_target),
        Job("wrong", "a wrong result, on purpose", 1, wrong),
    ]


def run_jobs(
    todo: Sequence[Job], seconds: float, keep: Callable[[str, cells.Row], object] = lambda name, row: None
) -> tuple[list[cells.Row], list[str]]:
    """Rows, and the names of what was left out: a job starts only where its kind's longest run still fits.

    Each row is handed to `keep` when it is there. One whose job failed has an "error" and no "times".
    """
    end = time.monotonic() + seconds
    longest: dict[str, float] = {}
    rows, left_out = [], []
    for job in todo:
        begin = time.monotonic()
        if begin + longest.get(job.kind, job.seconds) > end:
            left_out.append(job.name)
            continue
        try:
            with deadline(end - begin):
                row = job.run()
        except (TimeoutError, torch.OutOfMemoryError) as reason:
            left_out.append(f"{job.name} ({reason or type(reason).__name__})")
            continue
        except Exception as reason:  # whatever one cell meets, the others are measured
            row = {"kind": job.kind, "error": f"{type(reason).__name__}: {reason}"}
        finally:
            with contextlib.suppress(RuntimeError):  # after a kernel that failed
                torch.cuda.empty_cache()
        row = {"name": job.name, **row}
        rows.append(row)
        keep(job.name, row)
        taken = time.monotonic() - begin
        longest[job.kind] = max(longest.get(job.kind, 0), taken)
        figures = (f"{k} {min(v.values()) * 1e3:.1f} us" for k, v in row.get("times", {}).items())
        print(f"{taken:5.1f} s  {job.name}: {', '.join(figures) or row['error']}", flush=True)
    return rows, left_out


class deadline:
    """Raises TimeoutError inside the block after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = max(seconds, 0.001)

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError("out of time")

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


# ---- goals


def best(times: cuda.Times, names: Sequence[str], way: str) -> float:
    return min(times[name][way] for name in names if way in times.get(name, {}))


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def shortest(times: dict[str, float]) -> float:
    return times.get("graph", times["eager"])


def goals(rows: Sequence[cells.Row], limits: cells.Row) -> list[tuple[str, float, float]]:
    """(goal, reached, wanted): reached, a ratio, passes from wanted on; NaN where nothing was measured."""
    found = []
    for row in rows:
        times, batch = row["times"], row.get("batch")
        if row["operator"] == "diversity l1" and "torch.compile" not in times:
            limit = DIVERSITY_GOALS_MS[batch]
            found.append((f"l1 B={batch} within {limit} ms", limit / shortest(times["kegfast"]), 1))
            if batch in CDIST_GOALS:
                ratio = times["cdist"]["eager"] / times["kegfast autograd"]["eager"]
                found.append((f"l1 B={batch} over cdist", ratio, CDIST_GOALS[batch]))
        if row["operator"] == "generator step":
            ratio = times["eager"]["eager"] / shortest(times["kegfast"])
            found.append(("generator step, graph over eager", ratio, 10))
    tucker = [row for row in rows if row["operator"] == "tucker2" and row["dtype"] == "torch.bfloat16"]
    goal = [row for row in tucker if row["family"] == "resnet" and row["share"] in (4, 8)]
    goal = [row for row in goal if "/" not in row["shape"].split(" ")[0]]

    def ratios(chosen: Sequence[cells.Row], way: str) -> list[float]:
        return [best(row["times"], CUDNN, way) / row["times"]["kegfast"][way] for row in chosen]

    large, single = ([row for row in goal if row["batch"] == n] for n in (128, 1))
    found += [
        ("ResNet C/4, C/8, batch 128, over the best cuDNN form", geometric(ratios(large, "graph")), 1.35),
        ("ResNet C/4, C/8, batch 1, eager", geometric(ratios(single, "eager")), 2.0),
        ("ResNet C/4, C/8, batch 1, graphs", geometric(ratios(single, "graph")), 1.4),
    ]
    every = ratios(tucker, "graph") + ratios(tucker, "eager")
    found.append(("worst configuration over the best cuDNN form", min(every, default=math.nan), 1.0))
    shares = [row["share_of_bandwidth"] for row in large]
    found.append(("ResNet C/4, C/8, batch 128, share of the measured bandwidth", geometric(shares), 0.7))
    return found


def shares(rows: Sequence[cells.Row], limits: cells.Row) -> None:
    """Adds each row's share of the measured bandwidth and matrix peak."""
    for row in rows:
        seconds = shortest(row["times"].get("kegfast") or row["times"]["kegfast autograd"]) / 1e3
        if "bytes" in row:
            row["share_of_bandwidth"] = row["bytes"] / seconds / limits["copy_bytes_per_s"]
        if "flop" in row:
            peak = limits[f"{row['dtype'].removeprefix('torch.')}_flop_per_s"]
            row["share_of_matrix_peak"] = row["flop"] / seconds / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="for all cells together (default 300)")
    parser.add_argument("--out", type=Path, help="folder for all that is written")
    parser.add_argument("--emulated", action="store_true", help="a dry run of two cells on the CPU")
    arguments = parser.parse_args()
    emulated = arguments.emulated
    if not emulated and not (torch.cuda.is_available() and build_info()["cuda_kernels"]):
        raise SystemExit("bench_cuda needs a CUDA device and a kegfast built with nvcc")
    begin = time.monotonic()
    torch.manual_seed(0)
    broken = [] if emulated else cells.broken_forms()
    for name in broken:  # else no cell of Tucker-2 would come to its end
        print(f"{'broken':12}form {name}")
        del cuda.FORMS[name]
    limits = {} if emulated else cells.ceilings()
    folder = arguments.out or RESULTS

    def keep(name: str, row: cells.Row) -> None:
        write_json(folder / "cuda-cells" / (re.sub(r"[^\w.]+", "-", name) + ".json"), row)

    todo = emulated_jobs() if emulated else jobs()
    rows, left_out = run_jobs(todo, arguments.seconds - (time.monotonic() - begin), keep)
    measured = [row for row in rows if "times" in row]
    shares(measured, limits)
    reached = goals(measured, limits)
    device = "emulated" if emulated else torch.cuda.get_device_name()
    tf32 = {
        "cudnn": torch.backends.cudnn.conv.fp32_precision,
        "matmul": torch.backends.cuda.matmul.fp32_precision,
    }
    results = {
        "device": device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fp32_precision": tf32,
        "ceilings": limits,
        "broken_forms": broken,
        "rows": rows,
        "left_out": left_out,
        "goals": [
            {"goal": goal, "reached": None if math.isnan(value) else value, "wanted": wanted}
            for goal, value, wanted in reached
        ],
    }
    write_results(f"cuda-{device.replace(' ', '-').lower()}", results, folder)
    cuda.save_table(cuda.PACKAGED if arguments.out is None else folder / "cuda_table.json")
    for row in rows:
        if "error" in row:
            print(f"{'wrong':12}{row['name']}: {row['error']}")
    print(f"fp32_precision: {tf32}; left out for time or memory: {', '.join(left_out) or 'nothing'}")
    for goal, value, wanted in reached:
        print(f"{'pass' if value >= wanted else 'falls short':12}{value:8.2f} of {wanted:<6} {goal}")


if __name__ == "__main__":
    main()
