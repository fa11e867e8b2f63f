"""kegfast: compress a trained network without its training data."""

from kegfast import functional, nn, reference
from kegfast.native import backend, build_info, cpu_isa
from kegfast.version import __version__

__all__ = ["__version__", "backend", "build_info", "cpu_isa", "functional", "nn", "reference"]
