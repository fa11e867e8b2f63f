"""How generators are trained: the published recipe, the default one, and any other."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from kegfast._util import check
from kegfast._util.check import expected
from kegfast.extraction.terms import (
    BatchNormStatistics,
    ClassBalance,
    Classification,
    Diversity,
    GeneratorTerm,
    Reconstruction,
    TotalVariation,
)

Labels = Literal["one-hot", "soft"]
"""What generators are asked for: one class, or a number in [0, 1) per class, as where the paper samples."""


@dataclass(frozen=True)
class Recipe:
    """How generators are trained.

    Attributes:
        steps: Steps per generator.
        batch_size: Samples per generator and step.
        lr: Adam's, at the start.
        cosine: Whether the learning rate falls to 0 along a half cosine; constant otherwise.
        alpha: Weight of the decoder's error, KegNet's alpha.
        beta: Weight of the diversity term, KegNet's beta.
        batch_norm: Weight of `BatchNormStatistics`.
        total_variation: Weight of `TotalVariation`.
        class_balance: Weight of `ClassBalance`.
        ranged: Whether images are kept in `input_range` where that is given; otherwise every image
            has mean 0 and deviation 1.
        labels: "one-hot", or "soft": one number in [0, 1) per class, for the loss scaled to sum 1.
    """

    steps: int = 20_000
    batch_size: int = 256
    lr: float = 1e-3
    cosine: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    batch_norm: float = 0.0
    total_variation: float = 0.0
    class_balance: float = 0.0
    ranged: bool = False
    labels: Labels = "one-hot"

    def terms(self) -> list[GeneratorTerm]:
        """The terms of the objective, those of weight 0 left out."""
        terms: list[GeneratorTerm] = [
            Classification(),
            Reconstruction(self.alpha),
            Diversity(self.beta),
            BatchNormStatistics(self.batch_norm),
            TotalVariation(self.total_variation),
            ClassBalance(self.class_balance),
        ]
        return [term for term in terms if term.weight != 0]

    def but(self, **changes: Any) -> "Recipe":
        """The same recipe with other values, those that are None left out of account."""
        return replace(self, **{name: v for name, v in changes.items() if v is not None})


RECIPES = {
    "paper": Recipe(),
    "kegfast": Recipe(
        steps=600,
        batch_size=64,
        lr=2e-3,
        cosine=True,
        beta=0.0,
        batch_norm=0.1,
        ranged=True,
    ),
}


def resolve(recipe: str | Recipe, **overrides: Any) -> Recipe:
    """The recipe of that name, or the one given, with the overrides that are not None; checked."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(expected("recipe", f"one of {sorted(RECIPES)} or a Recipe", recipe))
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(expected("recipe", f"one of {sorted(RECIPES)} or a Recipe", recipe))
    recipe = recipe.but(**overrides)
    check.count("steps", recipe.steps)
    check.count("batch_size", recipe.batch_size, 2)  # BatchNorm needs a pair
    check.number("lr", recipe.lr, above=0)
    for name in ("alpha", "beta", "batch_norm", "total_variation", "class_balance"):
        check.number(name, getattr(recipe, name), least=0)
    check_labels(recipe.labels)
    return recipe


def check_labels(labels: str) -> None:
    """Raises ValueError unless these are `Labels`."""
    if labels not in ("one-hot", "soft"):
        raise ValueError(expected("labels", "'one-hot' or 'soft'", labels))
