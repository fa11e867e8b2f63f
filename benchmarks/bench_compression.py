"""Accuracy straight after compression, with no training of any kind, and latency beside the original.

    python -m benchmarks.bench_compression curve --teacher fashion --root ../shared [--json FILE]
    python -m benchmarks.bench_compression latency [--models lenet5 resnet14 ...] [--json FILE]

Cells are added to the file as they are done, and those that it has are left out, so that a run that was
stopped goes on; --again measures them anew.

curve: one published teacher at rising ratios; how the ranks are chosen is the only difference between the
columns. evbmf has no ratio to ask for: it stands with the paper's layers and with all layers. Images are the
first of the test set; calibration never sees a label or a test image. Made samples are 1,024, real ones 256.
latency: the ranks of 1.5x, 2x and 4x fewer parameters, compressed with an example of batch 1, 8 and 64, on
one thread and on two. The original and its three students then take turns once more, and those medians are
what is written; layers that compress rolled back leave a ratio below the one asked for. Ranks of ResNet-18
and ResNet-50 are multiples of 8.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine
from benchmarks.resnet import resnet18, resnet50
from kegfast import Generators, compress, data, load_weights
from kegfast._util.files import write_json
from kegfast._util.timing import interleaved
from kegfast.compression.costs import factor_parameters
from kegfast.compression.report import CompressionReport
from kegfast.decomposition.ranks import layer_rank
from kegfast.distillation import Mixture
from kegfast.extraction.procedural import DeadLeaves
from kegfast.models import LeNet5, ResNet14

RATIOS = (1.2, 1.4, 1.58, 2.0, 2.9, 4.0, 5.74, 8.0)
TEACHERS = {  # model, data set, mean and std of its normalization, the layers that the paper compresses
    "mnist": (LeNet5, "mnist", 0.1307, 0.3081, ["conv2", "conv3"]),
    "fashion": (ResNet14, "fashion-mnist", 0.2856, 0.3385, ["layers3.*"]),
}
MODELS = {  # model, sample, the multiples that its ranks are
    "lenet5": (LeNet5, (1, 32, 32), 1),
    "resnet14": (ResNet14, (1, 32, 32), 1),
    "resnet18": (resnet18, (3, 224, 224), 8),
    "resnet50": (resnet50, (3, 224, 224), 8),
}
ASKED = (1.5, 2.0, 4.0)

MADE, REAL = 1024, 256
"""Samples to calibrate with."""

Cell = dict[str, Any]
Place = tuple[Any, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("curve", "latency"))
    parser.add_argument("--teacher", choices=TEACHERS, default="fashion")
    parser.add_argument("--root", type=Path, default=Path("../shared"))
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument(
        "--generators",
        type=Path,
        help="of kegfast extract: a column of theirs and three times as many leaves",
    )
    parser.add_argument("--ways", nargs="+", help="only columns that contain one of these words")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="also what the file has already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = known(args.json)
    done = set() if args.again else {place(cell) for cell in cells}
    for found in {"curve": curve, "latency": latency}[args.what](args, done):
        for cell in found:
            print("  ".join(f"{key} {value}" for key, value in cell.items()), flush=True)
        cells = [cell for cell in cells if place(cell) != place(found[0])] + found
        if args.json:
            write_json(args.json, {"about": about(args), "cells": cells})


def known(path: Path | None) -> list[Cell]:
    """The cells that a file holds already."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path and path.exists() else []


def place(cell: Cell) -> Place:
    """What is measured at once."""
    keys = ("model", "threads", "batch") if "model" in cell else ("teacher", "asked", "way")
    return tuple(cell[key] for key in keys)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {"command": args.what, **({"images": args.images} if args.what == "curve" else {}), **machine()}


def curve(args: argparse.Namespace, done: set[Place]) -> Iterator[list[Cell]]:
    """Accuracy of every way to choose ranks at every ratio."""
    make, name, mean, std, layers = TEACHERS[args.teacher]
    weights = args.root / f"pretrained/kegnet/{args.teacher}.pth.tar"
    teacher = load_weights(make(), weights).eval()
    splits = data.load(name, args.root / "data")
    images, labels = (t[: args.images] for t in splits.test.tensors)
    score = partial(accuracy, images=images, labels=labels)
    rules = {"ratio": float, "energy": "energy={:.6f}".format}
    ways = calibrations(args, splits.train.tensors[0], DeadLeaves((1, 32, 32), mean, std))

    def run(way: str, asked: float | None) -> tuple[nn.Module, CompressionReport | None]:
        if way == "teacher":
            return teacher, None
        if asked is None:
            return compress(teacher, include=layers if "paper" in way else None)
        if way in rules:
            return compress(teacher, rules[way](number_for(teacher, asked, rules[way])))
        torch.manual_seed(0)  # sources draw the same samples for every ratio
        return compress(teacher, budget={"params": 1 / asked}, **ways[way])

    fixed = ["teacher", "evbmf, the paper's layers", "evbmf, all layers"]
    places = [(None, way) for way in fixed] + list(product(args.ratios, [*rules, *ways]))
    for asked, way in places:
        chosen = args.ways is None or any(word in way for word in args.ways)
        if chosen and (args.teacher, asked, way) not in done:
            student, report = run(way, asked)
            yield [
                {
                    "teacher": args.teacher,
                    "asked": asked,
                    "ratio": round(report.ratio, 3) if report else 1.0,
                    "way": way,
                    "accuracy": score(student),
                }
            ]


def calibrations(args: argparse.Namespace, images: Tensor, leaves: DeadLeaves) -> dict[str, dict[str, Any]]:
    """What each budget's column gives to compress."""
    torch.manual_seed(0)
    real = images[torch.randperm(len(images))[:REAL]]
    ways: dict[str, dict[str, Any]] = {
        "budget, weights alone": {},
        "budget, noise": {"example_input": torch.zeros(1, 1, 32, 32), "measure": False},
        "budget, dead leaves": {"calibration": leaves, "samples": MADE},
    }
    if args.generators is not None:
        mixture = Mixture([Generators.load(args.generators), leaves], weights=[1, 3])
        ways["budget, generators and leaves"] = {"calibration": mixture, "samples": MADE}
    return {**ways, "budget, 256 real": {"calibration": real}}


def number_for(teacher: nn.Module, ratio: float, rule: Callable[[float], Any]) -> float:
    """The share or energy at which a rule reaches a ratio, by bisection on the parameter count."""
    weights = [m.weight for m in teacher.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    total = sum(p.numel() for p in teacher.parameters())

    def parameters(number: float) -> int:
        ranks = [layer_rank(weight, rule(number)) for weight in weights]
        sizes = [factor_parameters(w.shape, rank) for w, rank in zip(weights, ranks, strict=True)]
        kept = sum(min(size, w.numel()) for size, w in zip(sizes, weights, strict=True))
        return total - sum(w.numel() for w in weights) + kept

    low, high = 1e-3, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) <= total / ratio else (low, middle)
    return low


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return round(100 * right / len(labels), 2)


def latency(args: argparse.Namespace, done: set[Place]) -> Iterator[list[Cell]]:
    """The original and its students of all ratios, in one interleaved run for each batch and thread count."""
    for name in args.models:
        open_ = [(t, b) for t, b in product(args.threads, args.batches) if (name, t, b) not in done]
        if not open_:
            continue
        make, shape, step = MODELS[name]
        torch.manual_seed(0)
        model = make().eval()
        ranks = {
            ratio: compress(model, budget={"params": 1 / ratio}, measure=False, round_to=step)[1].ranks
            for ratio in ASKED
        }
        for threads, batch in open_:
            torch.set_num_threads(threads)
            yield latency_cells(name, model, ranks, torch.randn(batch, *shape), threads)


def latency_cells(
    name: str, model: nn.Module, ranks: dict[float, dict[str, Any]], x: Tensor, threads: int
) -> list[Cell]:
    """A student that was rolled back altogether is the original, and takes as long."""
    start = time.perf_counter()
    found = {ratio: compress(model, wanted, example_input=x) for ratio, wanted in ranks.items()}
    calls = {"before": partial(model, x)}
    calls |= {str(ratio): partial(student, x) for ratio, (student, report) in found.items() if report.ranks}
    with torch.inference_mode():
        times = interleaved(calls, 3, seconds=1.0)
    seconds = time.perf_counter() - start
    medians = {ratio: times.get(str(ratio), times["before"]) for ratio in found}
    return [
        {
            "model": name,
            "threads": threads,
            "batch": len(x),
            "asked": ratio,
            "ratio": round(report.ratio, 3),
            "factored": len(report.ranks),
            "before_ms": round(1e3 * times["before"], 4),
            "after_ms": round(1e3 * medians[ratio], 4),
            "speedup": round(times["before"] / medians[ratio], 3),
            "seconds": round(seconds / len(found), 1),
        }
        for ratio, (_, report) in found.items()
    ]


if __name__ == "__main__":
    main()
