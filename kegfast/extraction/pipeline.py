"""The extraction loop: generators trained against a frozen classifier (KegNet, Algorithm 1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kegfast._util import check
from kegfast._util.check import expected
from kegfast._util.modules import channels_last
from kegfast.extraction import parallel
from kegfast.extraction.generators import Generators, check_samples
from kegfast.extraction.networks import Decoder, Range
from kegfast.extraction.recipe import Labels, Recipe, resolve
from kegfast.extraction.step import GeneratorObjective, Step
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.extraction.terms import GeneratorTerm
from kegfast.training import processes
from kegfast.training.loop import MetricsLog, run_steps, seeded


def extract(
    teacher: nn.Module,
    *,
    num_classes: int,
    sample_shape: Sequence[int],
    generators: int = 5,
    recipe: Literal["kegfast", "paper"] | Recipe = "kegfast",
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    noise_size: int = 10,
    input_range: Range | None = None,
    labels: Labels | None = None,
    faithful: bool = False,
    extra_terms: Sequence[GeneratorTerm] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    capture: bool = True,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    label: str = "extract",
) -> Generators:
    """Trains generators whose samples a classifier recognizes as the classes asked for.

    Each step draws labels uniformly and noise from N(0, I) for every generator and lowers
    cross-entropy + alpha * decoder error + beta * diversity (KegNet, Algorithm 1) and the terms that the
    recipe adds. All generators run in one batched step. The teacher stays untouched: a private copy of
    it is evaluated, in eval mode. Under torchrun each process trains some of the generators, on the draws
    that it would train them on alone, and all processes get all of them.

    Args:
        teacher: The classifier: samples (N, *sample_shape) to logits (N, num_classes).
        num_classes: The number of classes, at least 2.
        sample_shape: (channels, height, width) of an image; any other shape is a table's.
        generators: How many to train; their samples complement one another.
        recipe: "paper": the objective and schedule published; "kegfast": the shorter one with
            BatchNorm statistics; or a `Recipe`.
        steps: Overrides the recipe's.
        batch_size: Overrides the recipe's, per generator.
        lr: Overrides the recipe's.
        noise_size: The size of the noise vectors.
        input_range: The smallest and largest value of the teacher's input images after normalization,
            each a number or one per channel.
        labels: Overrides the recipe's: "one-hot" or "soft".
        faithful: Keep the teacher's copy in train mode as the authors' experiments do, for comparison:
            BatchNorm by each generator's own batch, dropout on.
        extra_terms: Further terms of the objective.
        seed: Of initial parameters and all draws.
        device: Where to train; the teacher's by default.
        amp: Whether to compute in bfloat16 where torch's autocast deems it safe.
        capture: Whether to replay the step as one CUDA graph on a GPU.
        compile: Whether to pass the objective through `torch.compile`.
        checkpoint: File that keeps the state of an unfinished run, one per process.
        resume: Whether to go on from `checkpoint`.
        metrics: Log that receives the terms.
        progress: Whether to show a bar.
        label: The name of the run in log and checkpoint.

    Returns:
        The generators, in eval mode, with `history`.

    Raises:
        TypeError, ValueError: An argument is wrong, or the teacher does not map samples of that shape
            to finite logits of that many classes.
        FloatingPointError: The training diverged.
    """
    recipe = resolve(recipe, steps=steps, batch_size=batch_size, lr=lr, labels=labels)
    check.counts(generators=generators, noise_size=noise_size)
    check_samples(num_classes, sample_shape, input_range)
    if not all(callable(term) and hasattr(term, "name") and hasattr(term, "weight") for term in extra_terms):
        raise TypeError(expected("extra_terms", "a list of terms", extra_terms))
    terms = [*recipe.terms(), *extra_terms]
    frozen = FrozenTeacher(teacher, any(term.name == "batch_norm" for term in terms), faithful)
    device = check.device("device", frozen.device if device is None else device)
    frozen.model.to(device)
    bounds = input_range if recipe.ranged else None
    frozen.check_gradient(frozen.check(num_classes, sample_shape, device, bounds))

    def stack(copies: int) -> tuple[Generators, nn.ModuleDict]:
        made = Generators(copies, num_classes, sample_shape, noise_size, bounds, recipe.labels)
        decoder = Decoder(copies, sample_shape, noise_size)
        networks = nn.ModuleDict({"generator": made.network, "decoder": decoder}).to(device)
        channels_last(made.network)
        return made, networks.train()

    rank, world = processes.place()
    own = parallel.share(generators, rank, world)
    size = own.stop - own.start
    with seeded(seed):
        result, whole = stack(generators)
        trained = whole
        if world > 1 and size:
            trained = stack(size)[1]
            parallel.take(trained, whole, own, generators)
    if size:
        objective = GeneratorObjective(trained["generator"], trained["decoder"], frozen, terms)
        step = Step(
            objective, recipe, num_classes, noise_size, generators, own,
            amp=amp, capture=capture, compile=compile,
        )  # fmt: skip
        result.history = run_steps(
            step,
            recipe.steps,
            state={"networks": trained, "optimizer": step.optimizer},
            seed=seed,
            checkpoint=parallel.own_path(checkpoint, rank, world),
            resume=resume,
            metrics=metrics if rank == 0 else None,
            progress=progress and rank == 0,
            label=label,
        )
    if world > 1:
        parallel.gather(whole, trained if size else None, generators, rank, world)
        result.history = parallel.mean_history(result.history, size, world)
    result.network.eval()
    return result
