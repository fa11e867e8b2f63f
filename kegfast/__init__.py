"""kegfast: compress a trained network without its training data."""

from kegfast import distillation, extraction, functional, nn, reference
from kegfast.distillation import distill
from kegfast.extraction import Generators, extract
from kegfast.native import backend, build_info, cpu_isa
from kegfast.version import __version__

__all__ = [
    "Generators",
    "__version__",
    "backend",
    "build_info",
    "cpu_isa",
    "distill",
    "distillation",
    "extract",
    "extraction",
    "functional",
    "nn",
    "reference",
]
