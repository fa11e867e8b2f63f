"""kegfast: compress a trained network without its training data."""

from kegfast import distillation, functional, nn, reference
from kegfast.distillation import distill
from kegfast.native import backend, build_info, cpu_isa
from kegfast.version import __version__

__all__ = [
    "__version__",
    "backend",
    "build_info",
    "cpu_isa",
    "distill",
    "distillation",
    "functional",
    "nn",
    "reference",
]
