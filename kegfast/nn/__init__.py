"""Modules: drop-in layers and losses over `kegfast.functional`."""

from kegfast.nn.diversity import DiversityLoss
from kegfast.nn.tucker import TuckerConv2d, TuckerLinear

__all__ = ["DiversityLoss", "TuckerConv2d", "TuckerLinear"]
