"""Teaching a student: losses, sources of samples, and the loop that joins them."""

from kegfast.distillation import boundary, losses, sources
from kegfast.distillation.distiller import distill
from kegfast.distillation.ensemble import Ensemble
from kegfast.distillation.hooks import Features
from kegfast.distillation.objective import Batch, Objective, Term
from kegfast.distillation.sources import (
    Augmented,
    GaussianNoise,
    InMemory,
    Mixture,
    Munge,
    Noisy,
    Pool,
    UniformNoise,
    as_source,
)
from kegfast.distillation.stages import born_again, fitnets

__all__ = [
    "Augmented",
    "Batch",
    "Ensemble",
    "Features",
    "GaussianNoise",
    "InMemory",
    "Mixture",
    "Munge",
    "Noisy",
    "Objective",
    "Pool",
    "Term",
    "UniformNoise",
    "as_source",
    "born_again",
    "boundary",
    "distill",
    "fitnets",
    "losses",
    "sources",
]
