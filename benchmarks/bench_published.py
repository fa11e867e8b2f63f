"""Why MNIST's third student stays below what was published: one thing changed at a time.

    python -m benchmarks.bench_published --root ../shared/data --teacher mnist.pth.tar --generators FILE

FILE is a generators-0.safetensors of `kegfast reproduce mnist --protocol paper`. Every variant is taught as
published but for one thing, and for as many steps: test accuracy by steps, and what the choice without data
takes. Finished cells are kept in --out.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_results
from kegfast import data, load_weights
from kegfast._util.machine import measured
from kegfast.experiments.epochs import Epochs, teach
from kegfast.experiments.paper import PROTOCOLS, paper
from kegfast.experiments.study import Study
from kegfast.extraction import Generators
from kegfast.recovery.judge import Judge, answers
from kegfast.training.loop import MetricsLog, seeded

STUDENT, STEPS, EACH = 3, 10_000, 6_400


@dataclass(frozen=True)
class Variant:
    """What is not as published.

    Attributes:
        labels: what generators are asked for.
        generators: how many of them.
        each: samples of each.
        shuffle: whether every epoch has an order of its own.
        rate: the learning rate.
        change: of the samples.
    """

    labels: str = "one-hot"
    generators: int = 5
    each: int = EACH
    shuffle: bool = False
    rate: float = 1e-5
    change: Callable[[Tensor, Study], Tensor] = lambda samples, study: samples


def in_range(samples: Tensor, study: Study) -> Tensor:
    """Every image stretched to the values that normalized pixels take."""
    low, high = (torch.tensor(bound).view(-1, 1, 1) for bound in study.info.input_range)
    least, most = samples.amin((2, 3), keepdim=True), samples.amax((2, 3), keepdim=True)
    return low + (high - low) * (samples - least) / (most - least).clamp(min=1e-6)


VARIANTS = {
    "as published": Variant(),
    "soft labels": Variant(labels="soft"),
    "shuffled": Variant(shuffle=True),
    "one generator": Variant(generators=1),
    "four times as many samples": Variant(each=4 * EACH),
    "pixels in the data's range": Variant(change=in_range),
    "a tenth of the rate": Variant(rate=1e-6),
    "ten times the rate": Variant(rate=1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--generators", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    args = parser.parse_args()
    experiment, splits = paper("mnist"), data.load("mnist", args.root)
    config = replace(experiment.config, protocol="paper", **PROTOCOLS["paper"] | {"steps": args.steps})
    teacher = load_weights(experiment.build(), args.teacher)
    study = Study(experiment, splits.info, splits, teacher, args.out, config)
    made = Generators.load(args.generators)
    rows = []
    for name, variant in VARIANTS.items():
        cell = study.ledger.cell(name, lambda v=variant, n=name: taught(study, made, v, n))
        rows.append({"variant": name, **cell})
        print(name, [f"{steps}: {accuracy}" for steps, accuracy in cell["curve"]], flush=True)
    write_results("published_mnist", {"steps": args.steps, "rows": rows})


def drawn(made: Generators, variant: Variant, study: Study) -> Tensor:
    """The samples of a variant, generator by generator."""
    made.labels = variant.labels
    with seeded(0):
        samples = made.sample(variant.each * made.copies, shuffle=False)[0]
    return variant.change(samples[: variant.each * variant.generators], study)


def taught(study: Study, made: Generators, variant: Variant, name: str) -> dict[str, Any]:
    """The curve of one variant's student, and the accuracy of the choice without data."""
    samples, student = drawn(made, variant, study), study.starts(STUDENT, "paper", "kegnet", 0)[0]
    plan = Epochs(variant.rate, most=10_000, patience=None, shuffle=variant.shuffle, look=1_000)
    judge = Judge(study.sources(0).subject, study.sources(0).judge())
    found = teach(
        student.to(memory_format=torch.channels_last),
        samples,
        answers(study.teacher, samples),
        plan,
        lambda model: judge.divergence(judge.verdicts(model)),
        study.accuracy,
        most=plan.within(study.config.steps, len(samples)),
        checkpoint=study.output / f"{name.replace(' ', '-')}.pt",
        metrics=MetricsLog(study.output / "metrics.jsonl"),
        label=name,
    )
    chosen = found.epoch * plan.steps(len(samples))
    return {
        "curve": found.curve,
        "chosen": chosen,
        "accuracy": study.accuracy(student),
        "measured": measured(),
    }


if __name__ == "__main__":
    main()
