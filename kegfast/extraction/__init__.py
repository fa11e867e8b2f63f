"""KegNet: generators of artificial data, trained against a frozen classifier."""

from kegfast.extraction.extract import RECIPES, Objective, Recipe, extract
from kegfast.extraction.generators import Generators
from kegfast.extraction.networks import Decoder, ImageGenerator, TableGenerator
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

__all__ = [
    "RECIPES",
    "Batch",
    "BatchNormStatistics",
    "Classification",
    "Decoder",
    "Diversity",
    "FrozenTeacher",
    "Generators",
    "ImageGenerator",
    "Objective",
    "Recipe",
    "Reconstruction",
    "TableGenerator",
    "Term",
    "TotalVariation",
    "extract",
]
