"""The extraction loop: generators trained against a frozen classifier (KegNet, Algorithm 1)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kegfast.check import expected
from kegfast.extraction.generators import Generators, one_hot
from kegfast.extraction.networks import Decoder, Range
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.extraction.terms import (
    Batch,
    BatchNormStatistics,
    Classification,
    Diversity,
    Reconstruction,
    Term,
    TotalVariation,
)
from kegfast.loop import MetricsLog, run_steps


@dataclass(frozen=True)
class Recipe:
    """How generators are trained.

    Attributes:
        steps: Steps per generator.
        batch_size: Samples per generator and step.
        learning_rate: Adam's, at the start.
        cosine: Whether the learning rate falls to 0 along a half cosine; constant otherwise.
        alpha: Weight of the decoder's error, KegNet's alpha.
        beta: Weight of the diversity term, KegNet's beta.
        batch_norm: Weight of `BatchNormStatistics`.
        total_variation: Weight of `TotalVariation`.
        ranged: Whether images are kept in `input_range` where that is given; otherwise every image
            has mean 0 and deviation 1.
    """

    steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    cosine: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    batch_norm: float = 0.0
    total_variation: float = 0.0
    ranged: bool = False

    def terms(self) -> list[Term]:
        """The terms of the objective, those of weight 0 left out."""
        terms: list[Term] = [
            Classification(),
            Reconstruction(self.alpha),
            Diversity(self.beta),
            BatchNormStatistics(self.batch_norm),
            TotalVariation(self.total_variation),
        ]
        return [term for term in terms if term.weight != 0]

    def but(self, **changes: float) -> "Recipe":
        """The same recipe with other values, those that are None left out of account."""
        return replace(self, **{name: v for name, v in changes.items() if v is not None})


RECIPES = {
    "paper": Recipe(),
    "kegfast": Recipe(
        steps=600,
        batch_size=64,
        learning_rate=2e-3,
        cosine=True,
        beta=0.0,
        batch_norm=0.1,
        ranged=True,
    ),
}


@dataclass
class Objective:
    """The weighted sum of terms that one batch of all generators is judged by."""

    generator: nn.Module
    decoder: nn.Module
    teacher: FrozenTeacher
    terms: Sequence[Term] = field(default_factory=list)

    def __call__(
        self,
        labels: Tensor,  # (G, N, classes)
        noise: Tensor,  # (G, N, noise_size)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over generators, and for the log each term's mean over them."""
        samples = self.generator(labels, noise)
        logits, norm_inputs = self.teacher(samples.flatten(0, 1))
        logits = logits.unflatten(0, noise.shape[:2])
        batch = Batch(labels, noise, samples, logits, self.decoder, norm_inputs)
        values = {term.name: term(batch) for term in self.terms}
        loss = sum(term.weight * values[term.name] for term in self.terms)
        log = {"loss": loss, **values}
        log["agreement"] = (logits.argmax(-1) == labels.argmax(-1)).float()
        return loss.sum(), {name: value.detach().mean() for name, value in log.items()}


def extract(
    teacher: nn.Module,
    *,
    num_classes: int,
    sample_shape: Sequence[int],
    generators: int = 5,
    recipe: Literal["kegfast", "paper"] | Recipe = "kegfast",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    noise_size: int = 10,
    input_range: Range | None = None,
    extra_terms: Sequence[Term] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    progress: bool = False,
    label: str = "extract",
) -> Generators:
    """Trains generators whose samples a classifier recognises as the classes asked for.

    Each step draws labels uniformly and noise from N(0, I) for every generator and lowers
    cross-entropy + alpha * decoder error + beta * diversity (KegNet, Algorithm 1) and the terms that the
    recipe adds. All generators run in one batched step. The teacher stays untouched: a private copy of
    it is evaluated, in eval mode.

    Args:
        teacher: The classifier: samples (N, *sample_shape) to logits (N, num_classes).
        num_classes: The number of classes, at least 2.
        sample_shape: (channels, height, width) of an image; any other shape is a table's.
        generators: How many to train; their samples complement one another.
        recipe: "paper": the objective and schedule published; "kegfast": the shorter one with
            BatchNorm statistics; or a `Recipe`.
        steps: Overrides the recipe's.
        batch_size: Overrides the recipe's, per generator.
        learning_rate: Overrides the recipe's.
        noise_size: The size of the noise vectors.
        input_range: The smallest and largest value of the teacher's input images after normalisation,
            each a number or one per channel.
        extra_terms: Further terms of the objective.
        seed: Of initial parameters and all draws.
        device: Where to train; the teacher's by default.
        amp: Whether to compute in bfloat16 where torch's autocast deems it safe.
        checkpoint: File that keeps the state of an unfinished run.
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
    recipe = _resolve(recipe, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    _check_sizes(num_classes=num_classes, generators=generators, noise_size=noise_size)
    _check_range(input_range, sample_shape)
    terms = [*recipe.terms(), *extra_terms]
    frozen = FrozenTeacher(teacher, watch=any(term.name == "batch_norm" for term in terms))
    device = torch.device(device) if device is not None else frozen.device
    frozen.model.to(device)
    frozen.check(num_classes, sample_shape, device)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = Generators(
            generators, num_classes, sample_shape, noise_size, input_range if recipe.ranged else None
        ).to(device)
        decoder = Decoder(generators, sample_shape, noise_size).to(device)
    network = result.network.to(memory_format=torch.channels_last)
    trained = nn.ModuleDict({"generator": network, "decoder": decoder}).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=recipe.learning_rate)
    objective = Objective(network, decoder, frozen, terms)
    size = (generators, recipe.batch_size)

    def step(i: int) -> Mapping[str, Tensor]:
        labels = one_hot(torch.randint(num_classes, size, device=device), num_classes)
        noise = torch.randn(*size, noise_size, device=device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _decay(recipe, i)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss, log = objective(labels, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return log

    result.history = run_steps(
        step,
        recipe.steps,
        state={"networks": trained, "optimizer": optimizer},
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        metrics=metrics,
        progress=progress,
        label=label,
    )
    network.eval()
    return result


def _decay(recipe: Recipe, i: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * i / recipe.steps)) if recipe.cosine else 1.0


def _resolve(recipe: str | Recipe, **overrides: float | None) -> Recipe:
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(expected("recipe", f"one of {sorted(RECIPES)} or a Recipe", recipe))
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(expected("recipe", f"one of {sorted(RECIPES)} or a Recipe", recipe))
    recipe = recipe.but(**overrides)
    _check_sizes(steps=recipe.steps, batch_size=recipe.batch_size)
    if not recipe.learning_rate > 0:
        raise ValueError(expected("learning_rate", "a positive number", recipe.learning_rate))
    return recipe


_LEAST = {"num_classes": 2, "batch_size": 2}  # one class needs no classifier; BatchNorm needs a pair


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        least = _LEAST.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(expected(name, f"an int of at least {least}", value))
        if value < least:
            raise ValueError(expected(name, f"an int of at least {least}", value))


def _check_range(input_range: Range | None, sample_shape: Sequence[int]) -> None:
    shape = tuple(sample_shape) if isinstance(sample_shape, Sequence) else ()
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(expected("sample_shape", "a tuple of positive ints", sample_shape))
    if input_range is None:
        return
    if len(shape) != 3:
        raise ValueError(expected("input_range", "None for samples that are no images", input_range))
    try:
        low, high = (torch.as_tensor(v, dtype=torch.float64).expand(shape[0]) for v in input_range)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            expected("input_range", f"(low, high), numbers or {shape[0]} per channel", input_range)
        ) from error
    if not bool(((low < high) & low.isfinite() & high.isfinite()).all()):
        raise ValueError(expected("input_range", "finite with low < high", input_range))
