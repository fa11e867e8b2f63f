"""kegfast: compress a trained network without its training data."""

from kegfast import data, distillation, extraction, functional, models, nn, reference
from kegfast.distillation import distill
from kegfast.extraction import Generators, extract
from kegfast.files import load_weights
from kegfast.native import backend, build_info, cpu_isa
from kegfast.training import evaluate, train
from kegfast.version import __version__

__all__ = [
    "Generators",
    "__version__",
    "backend",
    "build_info",
    "cpu_isa",
    "data",
    "distill",
    "distillation",
    "evaluate",
    "extract",
    "extraction",
    "functional",
    "load_weights",
    "models",
    "nn",
    "reference",
    "train",
]
