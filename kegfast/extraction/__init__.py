"""KegNet: generators of artificial data, trained against a frozen classifier."""

from kegfast.extraction.generators import Generators
from kegfast.extraction.networks import Decoder, ImageGenerator, TableGenerator
from kegfast.extraction.pipeline import extract
from kegfast.extraction.recipe import RECIPES, Recipe
from kegfast.extraction.step import Objective, Step
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.extraction.terms import (
    Batch,
    BatchNormStatistics,
    ClassBalance,
    Classification,
    Disagreement,
    Diversity,
    Reconstruction,
    Term,
    TotalVariation,
)

__all__ = [
    "RECIPES",
    "Batch",
    "BatchNormStatistics",
    "ClassBalance",
    "Classification",
    "Decoder",
    "Disagreement",
    "Diversity",
    "FrozenTeacher",
    "Generators",
    "ImageGenerator",
    "Objective",
    "Recipe",
    "Reconstruction",
    "Step",
    "TableGenerator",
    "Term",
    "TotalVariation",
    "extract",
]
