"""Whole networks frozen, against ONNX Runtime and OpenVINO on the same factors and on the dense network.

`python -m benchmarks.bench_frozen` prints, for LeNet5, ResNet14, and ResNet-18 and ResNet-50 at 224 pixels
with ranks C/4, the better runtime's time / ours in interleaved medians of one run, and whether that reaches
the goal; for the dense networks too. It writes benchmarks/results/frozen_PROCESSOR_ISA.json.
KEGFAST_CPU_ISA=avx2 measures kegfast on that instruction set; the runtimes keep to their own choice, unless
avx2_only.c hides the others from them too.
Rows that the file has from this machine, and that a run does not measure again, stay.
"""

import argparse
import warnings
from collections.abc import Callable

import torch

import kegfast
from benchmarks.bench_models import MODELS, networks
from benchmarks.common import earlier_results, machine_name, multiply_add_rate, write_results
from benchmarks.rivals import runtimes
from kegfast._util.machine import measured
from kegfast._util.timing import interleaved

GOALS = {  # (model, threads, batch): on AVX2, on AVX-512
    ("LeNet5", 1, 1): (2.0, 2.0),
    ("LeNet5", 1, 8): (1.5, 1.5),
    ("ResNet14", 1, 1): (1.6, 1.6),
    ("ResNet14", 1, 8): (1.4, 1.4),
    ("ResNet-18", 1, 1): (1.30, 1.35),
    ("ResNet-18", 1, 8): (1.25, 1.30),
    ("ResNet-18", 2, 1): (1.2, 1.2),
    ("ResNet-18", 2, 8): (1.2, 1.2),
    ("ResNet-50", 1, 1): (1.1, 1.1),
}
DENSE_GOALS = {("ResNet-18", 1, 1): (0.95, 0.95), ("ResNet-18", 1, 8): (0.95, 0.95)}
MOST_OVERHEAD = 3e-6  # seconds of a call beyond the sum of its steps

Row = dict[str, object]


def measure(name: str, threads: int, batch: int, kind: str, seconds: float) -> Row:
    """Medians of the runtimes and of the frozen network, and the runtimes' best / ours."""
    torch.set_num_threads(threads)
    kinds = networks(name, torch.contiguous_format)
    x = torch.randn(batch, *MODELS[name][1], generator=torch.Generator().manual_seed(0))
    frozen = kegfast.freeze(kinds["kegfast" if kind == "factored" else "dense"], x)
    calls: dict[str, Callable[[], object]] = dict(
        runtimes(kinds["sequential" if kind == "factored" else "dense"], x)
    )
    calls["kegfast"] = lambda: frozen(x)
    times = interleaved(calls, seconds=seconds, turn=0.02)
    steps = [frozen.report(x) for _ in range(20)]
    own = sum(min(report[i].seconds for report in steps) for i in range(len(steps[0])))
    ratio = min(times["onnxruntime"], times["openvino"]) / times["kegfast"]
    goals = (GOALS if kind == "factored" else DENSE_GOALS).get((name, threads, batch))
    return {
        "model": name,
        "kind": kind,
        "threads": threads,
        "batch": batch,
        "seconds": times,
        "step_seconds": own,
        "ratio": ratio,
        "goal": goals and goals[kegfast.build_info()["isa_active"] != "avx2"],
    }


def overhead(seconds: float) -> float:
    """What a call costs beyond its steps: that of a network of one small step."""
    torch.set_num_threads(1)
    x = torch.randn(1, 8)
    frozen = kegfast.freeze(torch.nn.Linear(8, 8), x)
    call = interleaved({"call": lambda: frozen(x)}, seconds=seconds, turn=0.02)["call"]
    return call - min(sum(step.seconds for step in frozen.report(x)) for _ in range(50))


def show(row: Row) -> None:
    """One line of it."""
    times = ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in row["seconds"].items())
    goal = row["goal"]
    verdict = "" if goal is None else f" (goal {goal}: {'pass' if row['ratio'] >= goal else 'short'})"
    print(
        f"{row['model']:10} {row['kind']:9} batch {row['batch']}, {row['threads']} threads: {times}; "
        f"best / kegfast {row['ratio']:.2f}{verdict}",
        flush=True,
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=["factored", "dense"], default=["factored", "dense"])
    parser.add_argument("--seconds", type=float, default=3.0, help="about so long for each row")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=Warning, module="torch.onnx")
    rows = []
    for threads in options.threads:
        for name in options.models:
            for batch in options.batches:
                for kind in options.kinds:
                    row = measure(name, threads, batch, kind, options.seconds)
                    rows.append(row | {"measured": measured()})
                    show(rows[-1])
    extra = overhead(options.seconds)
    verdict = "pass" if extra < MOST_OVERHEAD else "short"
    print(f"a call costs {1e6 * extra:.1f} us beyond its steps (goal below 3: {verdict})")
    name = f"frozen_{machine_name()}"
    places = ("model", "kind", "threads", "batch")
    found = {tuple(row[p] for p in places): row for row in earlier_results(name).get("configurations", [])}
    found |= {tuple(row[p] for p in places): row for row in rows}
    order = [
        (m, kind, t, b) for t in (1, 2) for m in MODELS for kind in ("factored", "dense") for b in (1, 8)
    ]
    write_results(
        name,
        {
            "ranks": "C/4",
            "multiply_adds_a_second": multiply_add_rate(),
            "call_overhead": extra,
            "configurations": [found[place] for place in order if place in found],
        },
    )


if __name__ == "__main__":
    main()
