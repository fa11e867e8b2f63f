"""What generators owe to each term of their objective, and a student to how it is taught with their samples.

    python -m benchmarks.bench_terms mnist --root ../shared/data --teacher mnist.pth.tar

The paper's third student at the paper's ranks; each row changes one thing of the first, which is the default
recipe (dead leaves are taught faster, as everywhere). Two generators of 600 steps of 64 samples each
(Fashion-MNIST 150), students of 16,384 samples in 1,000 steps of 128 (Fashion-MNIST 4,096 in 400), chosen
without data as `kegfast reproduce` chooses. Finished cells are kept in --out.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.bench_ablation import rows
from benchmarks.common import write_results
from kegfast import data, load_weights
from kegfast.distillation import InMemory, Mixture, Pool
from kegfast.distillation.sources import Source
from kegfast.experiments.paper import HINTED, NOISE, STRUCTURED, Config, Schedule, paper
from kegfast.experiments.study import Study
from kegfast.extraction import RECIPES, Disagreement, extract
from kegfast.recovery.judge import choice
from kegfast.training.loop import seeded

STUDENT, GENERATORS = 3, 2
FEW_SAMPLES = {  # in a fraction of the time that the tables take
    "mnist": Config(pool=16_384, steps=1_000, generator_steps=600),
    "fashion-mnist": Config(pool=4_096, steps=400, generator_steps=150, probe=256),
}


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        recipe: Fields of the default recipe that are changed.
        disagreement: Weight of the disagreement with the student, before it is taught.
        leaves: The share of dead leaves among the samples.
        schedule: How the student is taught.
    """

    recipe: Mapping[str, float | bool] = field(default_factory=dict)
    disagreement: float = 0.0
    leaves: float = 0.0
    schedule: Schedule = NOISE


PLAIN = {
    "default recipe": Variant(),
    "every image normalized by itself, as published": Variant({"ranged": False}),
    "with total variation": Variant({"total_variation": 1.0}),
    "with class balance": Variant({"class_balance": 1.0}),
    "with diversity": Variant({"beta": 1.0}),
    "without reconstruction": Variant({"alpha": 0.0}),
    "with disagreement": Variant(disagreement=1.0),
    "with half dead leaves": Variant(leaves=0.5, schedule=STRUCTURED),
    "dead leaves alone": Variant(leaves=1.0, schedule=STRUCTURED),
}
WITH_NORMS = {
    "default recipe": Variant(schedule=STRUCTURED),
    "without BatchNorm statistics": Variant({"batch_norm": 0.0}, schedule=STRUCTURED),
    "student keeps BatchNorm statistics": Variant(schedule=replace(STRUCTURED, batchnorm="eval")),
    "two blocks' features taught too": Variant(schedule=HINTED),
    "with half dead leaves": Variant(leaves=0.5, schedule=STRUCTURED),
}
VARIANTS = {"mnist": PLAIN, "fashion-mnist": WITH_NORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=list(VARIANTS))
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    experiment, splits = paper(args.dataset), data.load(args.dataset, args.root)
    teacher = load_weights(experiment.build(), args.teacher)
    output = args.out or Path(f"runs/terms-{args.dataset}")
    study = Study(experiment, splits.info, splits, teacher, output, FEW_SAMPLES[args.dataset])
    found = rows(lambda seed: measure(study, seed), args.seeds)
    write_results(f"terms_{args.dataset.split('-')[0]}", {"rows": found})


def measure(study: Study, seed: int) -> Iterator[tuple[str, float]]:
    """Each variant's name and accuracy; those that share generators share them."""
    made: dict[tuple, Source] = {}
    for name, variant in VARIANTS[study.paper.dataset].items():

        def cell(name: str = name, variant: Variant = variant) -> float:
            key = (*sorted(variant.recipe.items()), variant.disagreement)
            if variant.leaves < 1 and key not in made:
                made[key] = generators(study, variant, seed)
            pool = samples(study, made.get(key), variant, seed)
            return taught(study, f"{name} {seed}", pool, variant, seed)

        yield name, study.ledger.cell(f"{name}/{seed}", cell)


def generators(study: Study, variant: Variant, seed: int) -> Source:
    """Those that a variant asks for."""
    config, info = study.config, study.info
    extra = []
    if variant.disagreement:
        start = study.starts(STUDENT, "paper", "kegnet", seed)[0]
        extra.append(Disagreement(start, variant.disagreement))
    return extract(
        study.teacher,
        num_classes=info.num_classes,
        sample_shape=info.sample_shape,
        generators=GENERATORS,
        recipe=replace(RECIPES["kegfast"], **variant.recipe),
        steps=config.generator_steps,
        batch_size=config.generator_batch,
        input_range=info.input_range,
        extra_terms=extra,
        seed=seed,
    )


def samples(study: Study, made: Source | None, variant: Variant, seed: int) -> InMemory:
    """A pool of generated samples and dead leaves."""
    shares = {made: 1 - variant.leaves, study.sources(seed).source("procedural"): variant.leaves}
    parts = {source: share for source, share in shares.items() if share}
    with seeded(seed):
        return Pool(Mixture(list(parts), list(parts.values())), study.config.pool)


def taught(study: Study, name: str, pool: InMemory, variant: Variant, seed: int) -> float:
    """Accuracy of the chosen student."""
    lesson = replace(study.lesson(pool, "paper", "kegnet", seed), schedule=variant.schedule)
    starts = study.starts(STUDENT, "paper", "kegnet", seed)
    candidates, divergence = study.candidates(name, starts, lesson, study.sources(seed).judge())
    for leg in study.output.glob("*-leg*.pt"):
        leg.unlink()
    return study.accuracy(candidates[choice(divergence)])


if __name__ == "__main__":
    main()
