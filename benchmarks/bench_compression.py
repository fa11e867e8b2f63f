"""Accuracy straight after compression, with no training of any kind, and latency beside the original.

    python -m benchmarks.bench_compression curve --teacher fashion --root ../shared [--json FILE]
    python -m benchmarks.bench_compression latency [--models lenet5 resnet14 ...] [--json FILE]

curve: one published teacher at rising ratios; how the ranks are chosen is the only difference between the
columns. evbmf has no ratio to ask for: it stands with the paper's layers and with all layers. Images are the
first of the test set; calibration never sees a label or a test image.
latency: compress with `example_input` at 1.5x, 2x and 4x fewer parameters and batch 1, 8 and 64; teacher and
student take turns once more after it, and those medians are what is written.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.resnet import resnet18, resnet50
from kegfast import Generators, build_info, compress, data, load_weights
from kegfast.compression.costs import factor_parameters
from kegfast.compression.ranks import layer_rank
from kegfast.distillation import Mixture
from kegfast.extraction.procedural import DeadLeaves
from kegfast.files import write_json
from kegfast.models import LeNet5, ResNet14
from kegfast.timing import interleaved

RATIOS = (1.2, 1.4, 1.58, 2.0, 2.9, 4.0, 5.74, 8.0)
TEACHERS = {  # model, data set, mean and std of its normalisation, the layers that the paper compresses
    "mnist": (LeNet5, "mnist", 0.1307, 0.3081, ["conv2", "conv3"]),
    "fashion": (ResNet14, "fashion-mnist", 0.2856, 0.3385, ["layers3.*"]),
}
MODELS = {
    "lenet5": (LeNet5, (1, 32, 32)),
    "resnet14": (ResNet14, (1, 32, 32)),
    "resnet18": (resnet18, (3, 224, 224)),
    "resnet50": (resnet50, (3, 224, 224)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("curve", "latency"))
    parser.add_argument("--teacher", choices=TEACHERS, default="fashion")
    parser.add_argument("--root", type=Path, default=Path("../shared"))
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument(
        "--generators",
        type=Path,
        help="of kegfast extract: a column of half theirs, half leaves",
    )
    parser.add_argument("--ways", nargs="+", help="only columns that contain one of these words")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"about": about(args)}
    cells = curve(args) if args.what == "curve" else latency(args)
    result["cells"] = []
    for cell in cells:
        print("  ".join(f"{key} {value}" for key, value in cell.items()), flush=True)
        result["cells"].append(cell)
        if args.json:
            write_json(args.json, result)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "command": args.what,
        "images": args.images,
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "isa": build_info().get("isa_active"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.now(UTC).date().isoformat(),
    }


def curve(args: argparse.Namespace):
    """Accuracy of every way to choose ranks at every ratio."""
    make, name, mean, std, layers = TEACHERS[args.teacher]
    weights = args.root / f"pretrained/kegnet/{args.teacher}.pth.tar"
    teacher = load_weights(make(), weights).eval()
    splits = data.load(name, args.root / "data")
    images, labels = (t[: args.images] for t in splits.test.tensors)
    torch.manual_seed(0)
    real = splits.train.tensors[0][torch.randperm(len(splits.train))[:256]]
    leaves = DeadLeaves((1, 32, 32), mean, std).sample(256)[0]
    example = torch.zeros(1, 1, 32, 32)
    ways: dict[str, dict[str, Any]] = {
        "budget, weights alone": {},
        "budget, noise": {"example_input": example, "measure": False},
        "budget, dead leaves": {"calibration": leaves},
    }
    if args.generators is not None:
        mixture = Mixture([Generators.load(args.generators), DeadLeaves((1, 32, 32), mean, std)])
        torch.manual_seed(1)
        ways["budget, generators and leaves"] = {"calibration": mixture.sample(256)[0]}
    ways["budget, 256 real"] = {"calibration": real}
    score = partial(accuracy, images=images, labels=labels)
    yield {
        "teacher": args.teacher,
        "ratio": 1.0,
        "way": "teacher",
        "accuracy": score(teacher),
        "seconds": 0.0,
    }
    for way, include in (("evbmf, the paper's layers", layers), ("evbmf, all layers", None)):
        yield cell(args.teacher, way, lambda include=include: compress(teacher, include=include), score)
    rules = {"ratio": float, "energy": "energy={:.6f}".format}
    for ratio in args.ratios:
        for way in wanted(rules, args.ways):
            rank = rules[way](number_for(teacher, ratio, rules[way]))
            yield cell(args.teacher, way, lambda rank=rank: compress(teacher, rank), score)
        for way in wanted(ways, args.ways):
            options = ways[way]
            budget = {"params": 1 / ratio}
            run = partial(compress, teacher, budget=budget, **options)
            yield cell(args.teacher, way, run, score)


def wanted(ways: Iterable[str], words: list[str] | None) -> list[str]:
    return [way for way in ways if words is None or any(word in way for word in words)]


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


def cell(
    teacher: str, way: str, run: Callable[[], Any], score: Callable[[nn.Module], float]
) -> dict[str, Any]:
    start = time.perf_counter()
    student, report = run()
    seconds = time.perf_counter() - start
    return {
        "teacher": teacher,
        "ratio": round(report.ratio, 3),
        "way": way,
        "accuracy": score(student),
        "seconds": round(seconds, 2),
    }


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return round(100 * right / len(labels), 2)


def latency(args: argparse.Namespace):
    """The compressed model beside the original, in one interleaved run a cell."""
    for name in args.models:
        make, shape = MODELS[name]
        torch.manual_seed(0)
        model = make().eval()
        for batch in args.batches:
            x = torch.randn(batch, *shape)
            for ratio in (1.5, 2.0, 4.0):
                start = time.perf_counter()
                student, report = compress(model, budget={"params": 1 / ratio}, example_input=x)
                seconds = time.perf_counter() - start
                calls = {"before": lambda: model(x), "after": lambda s=student: s(x)}  # noqa: B023
                with torch.inference_mode():
                    times = interleaved(calls, seconds=1.0)
                yield {
                    "model": name,
                    "batch": batch,
                    "asked": ratio,
                    "ratio": round(report.ratio, 3),
                    "before_ms": round(1e3 * times["before"], 4),
                    "after_ms": round(1e3 * times["after"], 4),
                    "speedup": round(times["before"] / times["after"], 3),
                    "compress_seconds": round(seconds, 1),
                }


if __name__ == "__main__":
    main()
