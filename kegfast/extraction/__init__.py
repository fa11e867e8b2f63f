"""KegNet: generators of artificial data, trained against a frozen classifier."""

from kegfast.extraction.generators import Generators
from kegfast.extraction.networks import Decoder, ImageGenerator, TableGenerator
from kegfast.extraction.pipeline import extract
from kegfast.extraction.recipe import RECIPES, Recipe
from kegfast.extraction.step import GeneratorObjective, Step
from kegfast.extraction.teacher import FrozenTeacher
from kegfast.extraction.terms import (
    BatchNormStatistics,
    ClassBalance,
    Classification,
    Disagreement,
    Diversity,
    Generated,
    GeneratorTerm,
    Reconstruction,
    TotalVariation,
)

__all__ = [
    "RECIPES",
    "BatchNormStatistics",
    "ClassBalance",
    "Classification",
    "Decoder",
    "Disagreement",
    "Diversity",
    "FrozenTeacher",
    "Generated",
    "GeneratorObjective",
    "GeneratorTerm",
    "Generators",
    "ImageGenerator",
    "Recipe",
    "Reconstruction",
    "Step",
    "TableGenerator",
    "TotalVariation",
    "extract",
]
