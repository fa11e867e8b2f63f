"""What MNIST's third student owes to each kind of artificial image.

    python -m benchmarks.bench_ablation --root ../shared/data --teacher mnist.pth.tar

The paper's ranks and the budget of `kegfast reproduce mnist`. Each row leaves out one kind of images, whose
share goes to the others; the last two teach a layer's output beside the logits, and solve the factors on the
images first. Test accuracy after the last step. Finished cells are kept in --out.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import write_results
from kegfast import compress, data, load_weights
from kegfast.distillation import InMemory, Pool
from kegfast.distillation.sources import Source
from kegfast.experiments.ledger import spread
from kegfast.experiments.paper import paper, schedule
from kegfast.experiments.study import Lesson, Study
from kegfast.recovery.samples import image_kinds
from kegfast.training.loop import seeded

STUDENT, CALIBRATION = 3, 512
HINTED, SOLVED = "all kinds, the last convolution's output taught too", "all kinds, factors solved first"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    experiment, splits = paper("mnist"), data.load("mnist", args.root)
    teacher = load_weights(experiment.build(), args.teacher)
    study = Study(experiment, splits.info, splits, teacher, args.out)
    write_results("ablation_mnist", {"rows": rows(lambda seed: measure(study, seed), args.seeds)})


def rows(measure: Callable[[int], Iterable[tuple[str, float]]], seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Every variant's accuracies, printed as they come: one row each, with mean and spread over the seeds."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for name, accuracy in measure(seed):
            print(f"seed {seed}  {accuracy:.2f}  {name}", flush=True)
            found.setdefault(name, []).append(accuracy)
    return [{"variant": name, "accuracy": values, **spread(values)} for name, values in found.items()]


def measure(study: Study, seed: int) -> Iterator[tuple[str, float]]:
    """Each variant's name and accuracy."""
    kinds = list(kinds_of(study, seed))
    variants = {"all kinds": kinds}
    variants |= {f"without {left}": [kind for kind in kinds if kind != left] for left in kinds}
    variants |= dict.fromkeys((HINTED, SOLVED), kinds)
    drawn: dict[str, Tensor] = {}
    for name, chosen in variants.items():

        def cell(name: str = name, chosen: list[str] = chosen) -> float:
            if not drawn:
                drawn.update(draw(study, seed))
            samples = torch.cat([drawn[kind][: study.config.pool // len(chosen)] for kind in chosen])
            return taught(study, name, samples, seed)

        yield name, study.ledger.cell(f"{name}/{seed}", cell)


def kinds_of(study: Study, seed: int) -> dict[str, Source]:
    """The kinds of images that the default recipe mixes."""
    made = study.sources(seed).artificial
    return image_kinds(made.subject, made.pixels)


def draw(study: Study, seed: int) -> dict[str, Tensor]:
    """Of every kind as many images as a mixture of all but one needs."""
    kinds = kinds_of(study, seed)
    with seeded(seed):
        size = study.config.pool // (len(kinds) - 1)
        return {name: Pool(source, size).samples for name, source in kinds.items()}


def taught(study: Study, variant: str, samples: Tensor, seed: int) -> float:
    """Accuracy of a student of these samples."""
    student: nn.Module = study.starts(STUDENT, "paper", "kegfast", seed)[0]
    if variant == SOLVED:
        few = samples[:: len(samples) // CALIBRATION]
        ranks = dict(study.paper.students[STUDENT].ranks)
        student = compress(study.teacher, ranks, calibration=few, samples=len(few))[0]
    plan = schedule(study.sources(seed).subject, "kegfast")
    if variant == HINTED:
        plan = replace(plan, loss=f"{plan.loss} + hint@conv3:0.1")
    lesson = Lesson(InMemory(samples), samples, (), plan, seed)
    accuracy = study.accuracy(study.teach(f"{variant} {seed}", student, lesson)[-1])
    for leg in study.output.glob("*-leg*.pt"):
        leg.unlink()
    return accuracy


if __name__ == "__main__":
    main()
