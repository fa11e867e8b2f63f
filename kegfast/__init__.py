"""kegfast: compress a trained network without its training data."""

from kegfast import compression, data, distillation, extraction, functional, models, nn
from kegfast._tuning import autotune, tuning
from kegfast._util.files import load_weights
from kegfast.compression import CompressionReport, compress, densify, fuse, load, save
from kegfast.distillation import distill
from kegfast.extraction import Generators, extract
from kegfast.ops import reference
from kegfast.ops._native import backend, build_info, cpu_isa, last_kernel
from kegfast.recovery import ShrinkReport, shrink
from kegfast.training import evaluate, train
from kegfast.version import __version__

__all__ = [
    "CompressionReport",
    "Generators",
    "ShrinkReport",
    "__version__",
    "autotune",
    "backend",
    "build_info",
    "compress",
    "compression",
    "cpu_isa",
    "data",
    "densify",
    "distill",
    "distillation",
    "evaluate",
    "extract",
    "extraction",
    "functional",
    "fuse",
    "last_kernel",
    "load",
    "load_weights",
    "models",
    "nn",
    "reference",
    "save",
    "shrink",
    "train",
    "tuning",
]
