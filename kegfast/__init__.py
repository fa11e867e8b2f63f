"""kegfast: compress a trained network without its training data.

Names are imported when they are first used: `kegfast.runtime` needs no torch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from kegfast.version import __version__

if TYPE_CHECKING:
    from kegfast import compression, data, distillation, extraction, functional, models, nn
    from kegfast._tuning import autotune, tuning
    from kegfast._util.files import load_weights
    from kegfast.compression import CompressionReport, compress, densify, fuse, load, save
    from kegfast.distillation import distill
    from kegfast.extraction import Generators, extract
    from kegfast.freezing import Frozen, freeze
    from kegfast.ops import reference
    from kegfast.ops._native import backend, build_info, cpu_isa, last_kernel
    from kegfast.recovery import ShrinkReport, shrink
    from kegfast.training import evaluate, train

__all__ = [
    "CompressionReport",
    "Frozen",
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
    "freeze",
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

_PLACES = {
    "CompressionReport": "compression",
    "Frozen": "freezing",
    "Generators": "extraction",
    "ShrinkReport": "recovery",
    "autotune": "_tuning",
    "backend": "ops._native",
    "build_info": "ops._native",
    "compress": "compression",
    "cpu_isa": "ops._native",
    "densify": "compression",
    "distill": "distillation",
    "evaluate": "training",
    "extract": "extraction",
    "freeze": "freezing",
    "fuse": "compression",
    "last_kernel": "ops._native",
    "load": "compression",
    "load_weights": "_util.files",
    "reference": "ops",
    "save": "compression",
    "shrink": "recovery",
    "train": "training",
    "tuning": "_tuning",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(f"kegfast.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"kegfast.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"kegfast.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:  # whose programs expect torch.ops.kegfast
    importlib.import_module("kegfast.nn")
