"""Modules: drop-in layers and losses over `kegfast.functional`."""

from kegfast.nn.diversity import DiversityLoss
from kegfast.nn.soft_target import SoftTargetLoss
from kegfast.nn.tucker import TuckerConv2d, TuckerLinear

__all__ = ["DiversityLoss", "SoftTargetLoss", "TuckerConv2d", "TuckerLinear"]
